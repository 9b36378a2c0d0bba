"""Results as files: a CSV that is kept in the repository, and JSON."""

import csv
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import subquad
from subquad import _native
from subquad.cli.bench.outcome import Outcome
from subquad.cli.dependencies import installed_version
from subquad.cli.errors import UserError
from subquad.cli.machine import cpu_name, slug

# One order for all benchmarks, so that one file holds them all; what does not apply to a row stays empty.
FIELDS = (
    "time",
    "version",
    "profile",
    "level",
    "torch",
    "transformers",
    "bench",
    "shape",
    "dtype",
    "threads",
    "call",
    "seconds",
    "useful_flops",
    "peak_flops",
    "peak_kind",
    "peak_share",
    "torch_ratio",
    "scaling",
    "peak_scaling",
    "floor",
    "bytes",
    "limit",
    "method",
    "peak_read",
    "useful_bytes",
    "peak_bytes",
    "torch_floor",
    "against",
    "against_ratio",
    "against_limit",
    "error",
    "check",
)


def _context() -> dict[str, Any]:
    config = _native.config()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": subquad.__version__,
        "profile": config["profile"],
        "level": config["level"],
        "torch": installed_version("torch"),
        "transformers": installed_version("transformers"),
    }


def prepare(directory: Path) -> Path:
    """Makes sure that today's results can be appended, before minutes are spent on measuring them.

    Args:
        directory: The root of the records; created if necessary.

    Returns:
        The file: `<directory>/<cpu>/<date>.csv`, the date in UTC.

    Raises:
        UserError: It cannot be written, or was begun with other columns.
    """
    path = directory / slug(cpu_name()) / f"{datetime.now(timezone.utc).date().isoformat()}.csv"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                if tuple(next(csv.reader(file), FIELDS)) != FIELDS:
                    raise UserError(f"{path} has other columns than these results: move it out of the way")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"cannot write {path}: permission denied")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def append(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Appends the results to a file, which is started with a line of headings.

    Args:
        path: The file, from `prepare`.
        outcomes: The results.

    Raises:
        UserError: It cannot be written.
    """
    context = _context()
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            for outcome in outcomes:
                writer.writerows({**context, "bench": outcome.name, **record} for record in outcome.records)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def as_document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the results as a JSON document."""
    return {
        "cpu": cpu_name(),
        **_context(),
        "benches": {outcome.name: list(outcome.records) for outcome in outcomes},
        "failures": [failure for outcome in outcomes for failure in outcome.failures],
    }
