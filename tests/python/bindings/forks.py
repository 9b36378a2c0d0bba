"""Children of a process: code for processes of their own, as a fork must not take the threads of other tests with it."""

import textwrap

# Python 3.12 warns of forks beside threads, which is what is done here on purpose.
_FORKS = """
import os, signal, warnings

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)


def in_child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1] == 0
"""


def run_with_forks(run_python, prelude, code):
    """Runs `prelude` and `code` by the fixture `run_python`, with a function `in_child(work)`; returns what they print."""
    return run_python(_FORKS + textwrap.dedent(prelude) + textwrap.dedent(code))
