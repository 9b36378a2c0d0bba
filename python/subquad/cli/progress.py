"""Progress of a long command on standard error: live bars on a terminal with rich, plain lines anywhere else.

Standard output carries results only, so `subquad bench > file` keeps the progress on the screen.
"""

import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, TextIO

# Plain lines stay: what is only shown for a while is printed after so long without a line.
_SILENT_SECONDS = 10.0


class Stage(Protocol):
    """One stage of the work while it runs."""

    def advance(self, detail: str) -> None:
        """Records that one more of the stage's parts is done.

        Args:
            detail: What came out of it, shown to the user.
        """

    def show(self, detail: str) -> None:
        """Shows how far a part has come; may be called often."""


class Progress(Protocol):
    """Shows stages; a context manager that leaves the terminal as it was."""

    def stage(self, label: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """Shows a stage from entry to exit, and how long it took.

        Args:
            label: What is being done.
            total: How many parts it has (calls of `advance`); `None` if it is of one piece.
        """

    def note(self, message: str) -> None:
        """Shows a line that stays."""

    def __enter__(self) -> "Progress":
        """Starts showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops showing, whatever happened."""


class _PlainStage:
    def __init__(self, label: str, total: int | None, file: TextIO) -> None:
        self._label, self._total, self._file, self._done = label, total, file, 0
        self._printed = time.perf_counter()

    def _print(self, text: str) -> None:
        print(text, file=self._file, flush=True)
        self._printed = time.perf_counter()

    def advance(self, detail: str) -> None:
        self._done += 1
        count = f" {self._done}/{self._total}" if self._total else ""
        self._print(f"{self._label}{count}: {detail}")

    def show(self, detail: str) -> None:
        if time.perf_counter() - self._printed >= _SILENT_SECONDS:
            self._print(f"{self._label}: {detail}")


class PlainProgress:
    """Plain lines: for logs, pipes, and installs without rich."""

    def __init__(self, file: TextIO) -> None:
        """Writes to `file`."""
        self._file = file

    @contextmanager
    def stage(self, label: str, total: int | None = None) -> Generator[Stage]:
        """Prints a line at the start, one for each part, and one at the end with the seconds."""
        print(f"{label} ...", file=self._file, flush=True)
        start = time.perf_counter()
        yield _PlainStage(label, total, self._file)
        self.note(f"{label}: {time.perf_counter() - start:.1f} s")

    def note(self, message: str) -> None:
        """Prints a line."""
        print(message, file=self._file, flush=True)

    def __enter__(self) -> "PlainProgress":
        """Nothing to start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to stop."""


class _RichStage:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, detail: str) -> None:
        self._progress.update(self._task, advance=1, detail=detail)

    def show(self, detail: str) -> None:
        self._progress.update(self._task, detail=detail)


class RichProgress:
    """Spinner, bar and clock for each stage, drawn by rich."""

    def __init__(self, file: TextIO) -> None:
        """Draws on `file`, a terminal."""
        from rich import progress
        from rich.console import Console

        # Redrawing happens on a thread of its own and takes time from what is being measured: twice a second
        # is enough.
        self._progress = progress.Progress(
            progress.SpinnerColumn(finished_text="[green]✓[/]"),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=Console(file=file),
            refresh_per_second=2,
        )

    @contextmanager
    def stage(self, label: str, total: int | None = None) -> Generator[Stage]:
        """Draws one line that turns while the stage runs and is ticked off when it ends."""
        task = self._progress.add_task(label, total=total, detail="")
        yield _RichStage(self._progress, task)
        done = total or 1
        self._progress.update(task, total=done, completed=done)

    def note(self, message: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(message, markup=False, highlight=False)

    def __enter__(self) -> "RichProgress":
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops drawing and restores the cursor."""
        self._progress.stop()


def open_progress(file: TextIO | None = None) -> Progress:
    """Returns the progress display that suits `file` (standard error by default)."""
    file = sys.stderr if file is None else file
    if file.isatty() and find_spec("rich") is not None:
        return RichProgress(file)
    return PlainProgress(file)
