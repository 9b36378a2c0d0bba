"""Benchmark of memory: what one long call uses beyond its inputs and outputs, as an upper bound."""

from collections.abc import Mapping, Sequence

from subquad.cli.bench import memory_process, tensors
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


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("memory", MemoryShape, settings.shapes), settings.pattern)


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
            size, method, failure = memory_process.measure("memory", shape, dtype, threads)
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
