"""Writes `docs/hf_support.md`, or prints the rows of some models: `python -m tests.python.hf.zoo [type ...]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from . import table
from .catalogue import Entry, entries
from .survey import Row, survey


def _surveyed(chosen: Sequence[Entry], jobs: int) -> Iterator[Row]:
    executor = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    with executor:
        # Unlike those of a pool, futures do not wait for a process that has crashed.
        for done in as_completed([executor.submit(survey, one) for one in chosen]):
            yield done.result()


def main() -> int:
    """Runs the command; returns 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.python.hf.zoo", description=__doc__)
    parser.add_argument(
        "types", nargs="*", help="model types; all, and the file is written, if none is given"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    chosen = [one for one in entries() if not arguments.types or one.kind in arguments.types]
    rows: list[Row] = []
    start = time.perf_counter()
    for row in _surveyed(chosen, arguments.jobs):
        rows.append(row)
        print(f"{len(rows)}/{len(chosen)} {table.line(row)}", flush=True)
        for failure in row.failures:
            print(f"    {failure}", flush=True)
    failed = sorted(row.entry.kind for row in rows if row.failures)
    built = sum(row.not_built is None for row in rows)
    print(f"{built} of {len(rows)} built, {len(failed)} with failures, {time.perf_counter() - start:.0f} s")
    if failed:
        print("failures: " + ", ".join(failed))
    if not arguments.types:
        table.PATH.parent.mkdir(exist_ok=True)
        table.PATH.write_text(table.render(rows), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
