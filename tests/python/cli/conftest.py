"""What the tests of the command line share."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

import subquad
from subquad.cli import main

HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "safetensors",
    "platformdirs",
    "rich",
    "ml_dtypes",
    "jax",
)


class Answer(NamedTuple):
    """What a run of the command line gave back."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys) -> Callable[..., Answer]:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        status = main([str(each) for each in arguments])
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def process() -> Callable[..., Answer]:
    """Runs the command line in a process of its own, one thread, without the libraries in `absent`."""

    def run(*arguments: object, absent: tuple[str, ...] = HEAVY, **environment: str) -> Answer:
        # An entry of None makes an import fail and `find_spec` find nothing, as if it were not installed.
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
            "from subquad.cli import main; sys.exit(main())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SUBQUAD_NUM_THREADS": "1", **environment},
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def keep_threads():
    """Puts the thread counts back that a command sets for its process."""
    ours = subquad.get_num_threads()
    theirs = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    subquad.set_num_threads(ours)
    if theirs is not None:
        sys.modules["torch"].set_num_threads(theirs)


class Recorder:
    """A progress display that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.details: list[str] = []
        self.shown: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, label: str, total: int | None = None):
        self.stages.append((label, total))
        yield self

    def advance(self, detail: str) -> None:
        self.details.append(detail)

    def show(self, detail: str) -> None:
        self.shown.append(detail)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class Clock:
    """Stands in for the module `time`: it moves only when something sleeps or is said to take time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()
