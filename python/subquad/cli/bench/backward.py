"""Benchmark of training: forward and backward together.

Each call makes its output and log-sum-exp and the gradients of queries, keys and values. Beside its share of the
machine's peak stand torch's autograd, for a window the same calls without it, and the memory that they use beyond
what they return.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from subquad import _native
from subquad.cli.bench import against_peak, backward_calls, contenders, memory_process, requirements, tensors
from subquad.cli.bench.against_peak import AgainstPeak
from subquad.cli.bench.backward_shape import BackwardShape
from subquad.cli.bench.cases import possible_cases
from subquad.cli.bench.memory_process import Memory
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.timing import interleave, paired_ratio
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[BackwardShape, str]

COLUMNS = (
    *against_peak.COLUMNS,
    Column("vs torch"),
    Column("asked"),
    Column("vs dense"),
    Column("limit"),
    Column("MiB"),
    Column("limit MiB"),
    Column("error"),
    Column("check", text=True),
)


@dataclass(frozen=True, kw_only=True)
class Measurement(AgainstPeak):
    """One row: a shape and dtype at one thread count.

    Attributes:
        torch_floor: The least ratio to torch that is asked for, if any.
        dense_ratio: Median of our seconds / those without the window, for as much useful work, each pair from one
            round; `None` without a window.
        dense_limit: The most that is accepted, if anything.
        memory: What is used beyond inputs and results; `None` if it was not measured.
        memory_limit: The most bytes that are accepted, if anything.
    """

    torch_floor: float | None
    dense_ratio: float | None
    dense_limit: float | None
    memory: Memory | None
    memory_limit: float | None


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("backward", BackwardShape, settings.shapes), settings.pattern)


def _dense_ratio(shape: BackwardShape, samples: Mapping[str, Sequence[float]], threads: int) -> float | None:
    if shape.dense is None:
        return None
    ratio = paired_ratio(samples[f"subquad/{threads}"], samples[f"dense/{threads}"])
    return ratio * shape.dense.useful_flops / shape.useful_flops


def _memory(shape: BackwardShape, dtype: str, threads: int) -> Memory | None:
    if not shape.limit_mib_per_thread or tensors.numpy_dtype(dtype) is None:
        return None
    return memory_process.measure("backward", shape, dtype, threads)


def measure(shape: BackwardShape, dtype: str, settings: Settings) -> list[Measurement]:
    """Measures a shape in one dtype, all its thread counts in turn, and checks its results at each.

    Args:
        shape: The shape.
        dtype: The element type.
        settings: How to measure.

    Returns:
        A measurement for each thread count.
    """
    calls = backward_calls.make(shape, dtype, use_torch=settings.use_torch)
    timed = {"subquad": (calls.ours, False)}
    if calls.dense is not None:
        timed["dense"] = calls.dense, False
    if calls.theirs is not None:
        timed["torch"] = calls.theirs, calls.theirs_is_slow
    kind, level = contenders.peak_kind(dtype), str(_native.config()["level"])
    counts = shape.threads or (settings.threads,)
    field, checks = [], {}
    for count in counts:
        contenders.set_threads(count, use_torch=settings.use_torch)
        checks[count] = calls.check(dtype)
        field.append(contenders.peak(kind, count, use_torch=settings.use_torch))
        field += [
            contenders.attention(name, call, count, use_torch=settings.use_torch, is_slow=is_slow)
            for name, (call, is_slow) in timed.items()
        ]
    samples = interleave(field, repeat=settings.repeat, time_budget=settings.time_budget)
    measurements = []
    for count in counts:
        seconds, peaks = samples[f"subquad/{count}"], samples[f"peak/{count}"]
        theirs, memory = samples.get(f"torch/{count}"), _memory(shape, dtype, count)
        rates = [shape.useful_flops / each for each in seconds]
        measurements.append(
            Measurement(
                shape=shape,
                dtype=dtype,
                threads=count,
                seconds=median(seconds),
                peak_flops=median(peaks),
                peak_kind=kind,
                peak_share=paired_ratio(rates, peaks),
                torch_ratio=None if theirs is None else paired_ratio(theirs, seconds[: len(theirs)]),
                floor=requirements.share(shape.floor, dtype, count, level),
                error=checks[count].error,
                failure=checks[count].failure or ("" if memory is None else memory.failure),
                torch_floor=requirements.limit(shape.torch_floor.get(dtype), count),
                dense_ratio=_dense_ratio(shape, samples, count),
                dense_limit=requirements.limit(shape.limit_ratio, count),
                memory=memory,
                memory_limit=shape.memory_limit(dtype, count),
            )
        )
    return measurements


def _row(one: Measurement) -> Sequence[str]:
    absent = "-"
    used = None if one.memory is None else one.memory.bytes
    return (
        *one.cells(),
        *requirements.ratio(one.torch_ratio, one.torch_floor),
        absent
        if one.dense_ratio is None
        else requirements.at_most(f"{one.dense_ratio:.3f}", one.dense_ratio, one.dense_limit),
        absent if one.dense_limit is None else f"{one.dense_limit:g}",
        absent if used is None else requirements.at_most(f"{used / 2**20:.2f}", used, one.memory_limit),
        absent if one.memory_limit is None else f"{one.memory_limit / 2**20:g}",
        f"{one.error:.1e}",
        "WRONG" if one.failure else "ok",
    )


def _record(one: Measurement) -> Mapping[str, Value]:
    return {
        **one.record(),
        "torch_floor": one.torch_floor,
        "against": None if one.dense_ratio is None else "all keys",
        "against_ratio": one.dense_ratio,
        "against_limit": one.dense_limit,
        "bytes": None if one.memory is None else one.memory.bytes,
        "limit": one.memory_limit,
        "method": None if one.memory is None else one.memory.method,
    }


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Measures the cases.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table and the wrong results.
    """
    title = f"Forward and backward, useful GFLOP/s; level {_native.config()['level']}, {cpu_name()}"
    outcome = Outcome("backward", title, COLUMNS)
    possible = possible_cases(cases, settings, outcome)
    with progress.stage("backward", total=len(possible)) as stage:
        for shape, dtype in possible:
            measurements = measure(shape, dtype, settings)
            for one in measurements:
                outcome.add(one.case, _row(one), _record(one), one.failure)
            shares = ", ".join(f"{one.peak_share:.1%} of peak" for one in measurements)
            stage.advance(f"{shape.name}/{dtype}: {shares}")
    if outcome.records:
        outcome.notes.append(
            "vs dense: to the time without the window, for as much useful work; MiB: beyond inputs, outputs and "
            "gradients (upper bound)\nfloor, asked and limits: what is accepted (all but memory with two "
            "threads); ! is what misses it"
        )
    return outcome
