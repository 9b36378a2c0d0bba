"""Benchmark of memory: what one long call uses beyond its inputs and outputs.

Each case runs in a process of its own that has only called for one token before, so that scratch which is
kept from call to call counts too. The figure is the peak of the whole process, hence an upper bound: it
includes the pool's threads and the pages of code that the call touches for the first time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from subquad.cli.bench import tensors
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.shapes import MemoryShape
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[MemoryShape, str]

COLUMNS = (
    Column("shape", text=True),
    Column("dtype", text=True),
    Column("threads"),
    Column("MiB"),
    Column("MiB per thread"),
    Column("limit"),
    Column("method", text=True),
    Column("check", text=True),
)
_CHILD = "subquad.cli.bench.memory_child"


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("memory", MemoryShape, settings.shapes), settings.pattern)


def _measure(shape: MemoryShape, dtype: str, threads: int) -> tuple[int | None, str, str]:
    request = json.dumps({"shape": asdict(shape), "dtype": dtype, "threads": threads})
    # NumPy's huge pages would fill up around the arrays while the call runs, and count as its memory.
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-m", _CHILD]
    done = subprocess.run(
        command, input=request, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return None, "unavailable", last[0]
    answer = json.loads(done.stdout)
    return answer["bytes"], answer["method"], answer["failure"]


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Measures each case at each of its thread counts.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table and the wrong results.
    """
    outcome = Outcome("memory", f"Memory beyond inputs and outputs (upper bound), {cpu_name()}", COLUMNS)
    runs = [(shape, dtype, count) for shape, dtype in cases for count in shape.threads or (settings.threads,)]
    possible = [one for one in runs if tensors.numpy_dtype(one[1]) is not None]
    if len(possible) < len(runs):
        outcome.notes.append(
            "bfloat16 was left out: this benchmark uses NumPy, which has it only with ml_dtypes"
        )
    with progress.stage("memory", total=len(possible)) as stage:
        for shape, dtype, threads in possible:
            size, method, failure = _measure(shape, dtype, threads)
            each = None if size is None else size / threads / 2**20
            within = each is None or not shape.limit_mib_per_thread or each <= shape.limit_mib_per_thread
            row = (
                shape.name,
                dtype,
                str(threads),
                "-" if size is None else f"{size / 2**20:.2f}",
                "-" if each is None else f"{each:.2f}",
                f"{shape.limit_mib_per_thread:g}" if shape.limit_mib_per_thread else "-",
                method,
                "WRONG" if failure else "ok" if within else "over",
            )
            record: Mapping[str, Value] = {
                "shape": shape.name,
                "dtype": dtype,
                "threads": threads,
                "bytes": size,
                "limit": shape.limit_mib_per_thread * 2**20 * threads or None,
                "method": method,
                "check": failure or "ok",
            }
            case = f"{shape.name}/{dtype}, threads={threads}"
            outcome.add(case, row, record, failure)
            stage.advance(f"{case}: {row[4]} MiB per thread")
    return outcome
