"""Threads, instruction sets and environment variables.

| variable | meaning | default |
| --- | --- | --- |
| `SUBQUAD_NUM_THREADS` | threads of a call | PyTorch's when it is loaded, else the processors the process may use |
| `SUBQUAD_ISA` | `scalar`, `avx2`, `avx512`, `avx512bf16`, `amx`; at most the machine's | the fastest |
| `SUBQUAD_BLOCK_Q`, `SUBQUAD_BLOCK_K` | block sizes, for tests | from the shape |

Each is read once, at the first call that needs it.
"""

from __future__ import annotations

from . import _native


def set_num_threads(num_threads: int) -> None:
    """Sets the number of threads of later calls, in this process.

    Results do not depend on it: they are bitwise equal for every number of threads.

    Args:
        num_threads: 1 to 1024.

    Raises:
        ValueError: if `num_threads` is out of range.
    """
    _native.set_num_threads(num_threads)


def get_num_threads() -> int:
    """Returns the number of threads of the next call.

    The one given to `set_num_threads`, else `SUBQUAD_NUM_THREADS`, else `torch.get_num_threads()` when PyTorch is loaded,
    else the processors that the process may use (affinity and cgroup quotas included).
    """
    return _native.get_num_threads()


def config() -> dict[str, object]:
    """Returns version, build profile, instruction sets and threads by name."""
    return dict(_native.config())


def show_config() -> None:
    """Prints version, build profile, instruction sets and threads, one per line."""
    for name, value in config().items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' ')}: {text}")
