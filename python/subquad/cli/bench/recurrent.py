"""Benchmark of the recurrent operators.

Each is held against what bounds it: the machine's arithmetic, for the operations that the algorithm needs
(`recurrent_operators` counts them); the bandwidth of copying, for a convolution; that of reading and writing the state once,
for a step. Beside them, in the same rounds, are transformers' own fallbacks, for training under autograd, and what shapes say:
exact attention, other lengths, forward alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from subquad import _native
from subquad.cli.bench import contenders, memory_process, recurrent_calls, requirements, tensors
from subquad.cli.bench.cases import possible_cases
from subquad.cli.bench.memory_process import Memory
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.recurrent_calls import RecurrentCalls
from subquad.cli.bench.recurrent_shape import RecurrentShape
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.timing import interleave, paired_ratio
from subquad.cli.bench.verify import Check
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[RecurrentShape, str]
Samples = Mapping[str, Sequence[float]]

COLUMNS = (
    Column("work", text=True),
    Column("form", text=True),
    Column("dtype", text=True),
    Column("threads"),
    Column("ms"),
    Column("rate"),
    Column("peak"),
    Column("of peak"),
    Column("floor"),
    Column("vs fallback"),
    Column("asked"),
    Column("held against", text=True),
    Column("ratio"),
    Column("limit"),
    Column("MiB"),
    Column("limit MiB"),
    Column("error"),
    Column("check", text=True),
)


@dataclass(frozen=True)
class Peak:
    """What a call is bound by.

    Attributes:
        kind: `"f32"`, `"f64"`, `"bf16"`, `"copy"` or `"update"`.
        rate: Median of its probe, flops or bytes per second.
        share: Median of the call's rate / the probe's, each pair from one round.
    """

    kind: str
    rate: float
    share: float


@dataclass(frozen=True)
class Measurement:
    """One row: a call in one dtype at one thread count.

    Attributes:
        shape: What was called.
        dtype: Its element type.
        threads: The thread count.
        seconds: Median of one call.
        peak: What it is bound by; `None` for nothing.
        floor: The least share of that that is asked for, if any.
        torch_ratio: Median of the fallback's seconds / ours, each pair from one round; `None` without one.
        torch_floor: The least that is asked for, if anything.
        against: What it is held against; empty for nothing.
        against_ratio: Median of our seconds / those of that, each pair from one round; of the seconds of a token for lengths.
        against_limit: The most that is accepted, if anything.
        memory: What is used beyond inputs and results; `None` if it was not measured.
        memory_limit: The most bytes that are accepted, if anything.
        check: What the check of the results found.
    """

    shape: RecurrentShape
    dtype: str
    threads: int
    seconds: float
    peak: Peak | None
    floor: float | None
    torch_ratio: float | None
    torch_floor: float | None
    against: str
    against_ratio: float | None
    against_limit: float | None
    memory: Memory | None
    memory_limit: float | None
    check: Check

    @property
    def failure(self) -> str:
        """What is wrong with the results or with the process that measured memory; empty if nothing."""
        return self.check.failure or ("" if self.memory is None else self.memory.failure)


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("recurrent", RecurrentShape, settings.shapes), settings.pattern)


def _work(shape: RecurrentShape, dtype: str) -> int:
    """Returns what a call does of what it is bound by: flops, or bytes."""
    return shape.useful_flops if shape.bound == "arithmetic" else shape.useful_bytes(dtype)


def _peak(
    shape: RecurrentShape, dtype: str, seconds: Sequence[float], samples: Samples, count: int
) -> Peak | None:
    if not shape.bound:
        return None
    peaks = samples[f"peak/{count}"]
    rates = [_work(shape, dtype) / each for each in seconds]
    kind = contenders.peak_kind(dtype) if shape.bound == "arithmetic" else shape.bound
    return Peak(kind, median(peaks), paired_ratio(rates, peaks))


def _against(
    shape: RecurrentShape, names: Sequence[str], samples: Samples, count: int
) -> dict[str, list[float]]:
    """Returns the ratios to what calls are held against, of each round, by the names of the calls; none without such a thing."""
    seconds = {name: samples[f"{name}/{count}"] for name in names}
    if shape.against == "lengths":
        costs = {
            name: [each / tokens for each in seconds[name]]
            for name, tokens in zip(names, shape.tokens, strict=True)
        }
        bases = dict.fromkeys(names, min(costs.values(), key=median))
    elif shape.against or shape.form == "training":
        costs = {name: list(each) for name, each in seconds.items()}
        bases = {name: list(samples[f"base {name}/{count}"]) for name in names}
    else:
        return {}
    return {
        name: [each / base for each, base in zip(costs[name], bases[name], strict=True)] for name in names
    }


def _memory(shape: RecurrentShape, dtype: str, threads: int) -> Memory | None:
    is_possible = shape.form == "training" or tensors.numpy_dtype(dtype) is not None
    if not shape.limit_mib_per_thread or not is_possible:
        return None
    return memory_process.measure("recurrent", shape, dtype, threads)


def _sample(
    all_calls: Sequence[RecurrentCalls], dtype: str, counts: Sequence[int], settings: Settings
) -> tuple[Samples, dict[tuple[str, int], Check]]:
    """Checks calls at each thread count, and measures them all in turn."""
    field, checks = [], {}
    for count in counts:
        contenders.set_threads(count, use_torch=settings.use_torch)
        probe = all_calls[0].peak(dtype, count, use_torch=settings.use_torch)
        if probe is not None:
            field.append(probe)
        for calls in all_calls:
            name = calls.shape.name
            checks[name, count] = calls.check(dtype)
            timed = {name: calls.ours, f"base {name}": calls.base, f"torch {name}": calls.theirs}
            field += [
                contenders.attention(each, call, count, use_torch=settings.use_torch)
                for each, call in timed.items()
                if call is not None
            ]
    return interleave(field, repeat=settings.repeat, time_budget=settings.time_budget), checks


def measure(shape: RecurrentShape, dtype: str, settings: Settings, notes: list[str]) -> list[Measurement]:
    """Measures the calls of a shape in one dtype, all its thread counts in turn, and checks their results.

    Args:
        shape: The shape.
        dtype: The element type.
        settings: How to measure.
        notes: Is told of fallbacks that there are not.

    Returns:
        A measurement for each thread count and call.
    """
    parts = shape.calls()
    all_calls = [recurrent_calls.make(part, dtype, use_torch=settings.use_torch) for part in parts]
    notes += [calls.missing for calls in all_calls if calls.missing and calls.missing not in notes]
    counts = shape.threads or (settings.threads,)
    samples, checks = _sample(all_calls, dtype, counts, settings)
    level = str(_native.config()["level"])
    measurements = []
    for count in counts:
        ratios = _against(shape, [part.name for part in parts], samples, count)
        for part in parts:
            seconds, theirs = samples[f"{part.name}/{count}"], samples.get(f"torch {part.name}/{count}")
            limit = part.limit_mib_per_thread * 2**20 * count
            measurements.append(
                Measurement(
                    shape=part,
                    dtype=dtype,
                    threads=count,
                    seconds=median(seconds),
                    peak=_peak(part, dtype, seconds, samples, count),
                    floor=requirements.share(part.floor, dtype, count, level),
                    torch_ratio=None if theirs is None else paired_ratio(theirs, seconds),
                    torch_floor=requirements.limit(part.torch_floor.get(dtype), count),
                    against=shape.held_against,
                    against_ratio=median(ratios[part.name]) if ratios else None,
                    against_limit=requirements.limit(shape.limit_ratio, count),
                    memory=_memory(part, dtype, count),
                    memory_limit=limit or None,
                    check=checks[part.name, count],
                )
            )
    return measurements


def _row(one: Measurement) -> Sequence[str]:
    absent = "-"
    used = None if one.memory is None else one.memory.bytes
    unit = "FLOP/s" if one.shape.bound == "arithmetic" else "B/s"
    peak = (absent, absent, absent)
    if one.peak is not None:
        peak = (
            f"{_work(one.shape, one.dtype) / one.seconds / 1e9:.1f} G{unit}",
            f"{one.peak.rate / 1e9:.0f} {one.peak.kind}",
            requirements.at_least(f"{one.peak.share:.1%}", one.peak.share, one.floor),
        )
    return (
        one.shape.name,
        one.shape.form,
        one.dtype,
        str(one.threads),
        f"{one.seconds * 1e3:.3f}",
        *peak,
        absent if one.floor is None else f"{one.floor:.0%}",
        *requirements.ratio(one.torch_ratio, one.torch_floor),
        one.against or absent,
        absent
        if one.against_ratio is None
        else requirements.at_most(f"{one.against_ratio:.3f}", one.against_ratio, one.against_limit),
        absent if one.against_limit is None else f"{one.against_limit:g}",
        absent if used is None else requirements.at_most(f"{used / 2**20:.2f}", used, one.memory_limit),
        absent if one.memory_limit is None else f"{one.memory_limit / 2**20:g}",
        f"{one.check.error:.1e}",
        "WRONG" if one.failure else "ok",
    )


def _record(one: Measurement) -> Mapping[str, Value]:
    is_arithmetic = one.shape.bound == "arithmetic"
    return {
        "shape": one.shape.name,
        "dtype": one.dtype,
        "threads": one.threads,
        "call": one.shape.form,
        "seconds": one.seconds,
        "useful_flops": one.shape.useful_flops if is_arithmetic else None,
        "useful_bytes": one.shape.useful_bytes(one.dtype) if one.shape.bound and not is_arithmetic else None,
        "peak_flops": one.peak.rate if one.peak is not None and is_arithmetic else None,
        "peak_bytes": one.peak.rate if one.peak is not None and not is_arithmetic else None,
        "peak_kind": None if one.peak is None else one.peak.kind,
        "peak_share": None if one.peak is None else one.peak.share,
        "floor": one.floor,
        "torch_ratio": one.torch_ratio,
        "torch_floor": one.torch_floor,
        "against": one.against or None,
        "against_ratio": one.against_ratio,
        "against_limit": one.against_limit,
        "bytes": None if one.memory is None else one.memory.bytes,
        "limit": one.memory_limit,
        "method": None if one.memory is None else one.memory.method,
        "error": one.check.error,
        "check": one.failure or "ok",
    }


def _possible(cases: Sequence[Case], settings: Settings, outcome: Outcome) -> list[Case]:
    """Returns the cases that can be run here, and notes in `outcome` what was left out."""
    possible = possible_cases(cases, settings, outcome)
    if settings.use_torch:
        return possible
    without_training = [case for case in possible if case[0].form != "training"]
    if len(without_training) < len(possible):
        outcome.notes.append('training was left out: gradients are PyTorch\'s, which is in "subquad[bench]"')
    return without_training


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Measures the cases.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table, a line for each fallback that there is not, and the wrong results.
    """
    title = f"Recurrent operators; level {_native.config()['level']}, {cpu_name()}"
    outcome = Outcome("recurrent", title, COLUMNS)
    possible = _possible(cases, settings, outcome)
    with progress.stage("recurrent", total=len(possible)) as stage:
        for shape, dtype in possible:
            measurements = measure(shape, dtype, settings, outcome.notes)
            for one in measurements:
                case = f"{one.shape.name}/{dtype}, threads={one.threads}"
                outcome.add(case, _row(one), _record(one), one.failure)
            times = ", ".join(f"{one.seconds * 1e3:.3f} ms" for one in measurements)
            stage.advance(f"{shape.name}/{dtype}: {times}")
    if outcome.records:
        outcome.notes.append(
            "peak: arithmetic, copying (copy), or reading and writing the state once (update); vs fallback: "
            "transformers' own functions, for training under autograd\nratio: to the time of what it is held "
            "against, for a token where that is the cheapest length; MiB: beyond inputs and results (upper bound)\n"
            "floor, asked and limits: what is accepted (all but memory with two threads); ! is what misses it"
        )
    return outcome
