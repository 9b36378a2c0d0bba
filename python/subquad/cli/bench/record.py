"""Results as files: a CSV that is kept in the repository, and JSON."""

import csv
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import subquad
from subquad import _native
from subquad.cli.bench.outcome import Outcome
from subquad.cli.errors import UserError
from subquad.cli.machine import cpu_name, slug

# One order for all benchmarks, so that one file holds them all; what does not apply to a row stays empty.
FIELDS = (
    "time",
    "version",
    "profile",
    "level",
    "torch",
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
    "floor",
    "bytes",
    "limit",
    "method",
    "error",
    "check",
)


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _context(now: datetime) -> dict[str, Any]:
    config = _native.config()
    return {
        "time": now.isoformat(timespec="seconds"),
        "version": subquad.__version__,
        "profile": config["profile"],
        "level": config["level"],
        "torch": _torch_version(),
    }


def append(directory: Path, outcomes: Sequence[Outcome]) -> Path:
    """Appends the results to `<directory>/<cpu>/<date>.csv`, which is started with a line of headings.

    Args:
        directory: The root of the records; created if necessary.
        outcomes: The results.

    Returns:
        The file.

    Raises:
        UserError: It cannot be written.
    """
    now = datetime.now(timezone.utc)
    path = directory / slug(cpu_name()) / f"{now.date().isoformat()}.csv"
    context = _context(now)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            for outcome in outcomes:
                writer.writerows({**context, "bench": outcome.name, **record} for record in outcome.records)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def as_document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the results as a JSON document."""
    return {
        "cpu": cpu_name(),
        **_context(datetime.now(timezone.utc)),
        "benches": {outcome.name: list(outcome.records) for outcome in outcomes},
        "failures": [failure for outcome in outcomes for failure in outcome.failures],
    }
