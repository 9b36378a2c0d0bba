"""Benchmark of exact attention, prefill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from subquad import _native
from subquad.cli.bench import against_peak, contenders, requirements, tensors, verify
from subquad.cli.bench.against_peak import AgainstPeak
from subquad.cli.bench.cases import possible_cases
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.shapes import ExactShape
from subquad.cli.bench.timing import interleave, paired_ratio
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[ExactShape, str]

COLUMNS = (
    *against_peak.COLUMNS,
    Column("vs torch"),
    Column("error"),
    Column("check", text=True),
)


@dataclass(frozen=True)
class Scaling:
    """What more threads bring, each pair from one round.

    The machine itself rarely doubles its rate with its threads (shared cores, a lower clock, other
    processes); the probe's own scaling says how much there was to be had in these rounds.

    Attributes:
        base: The thread count that is compared with.
        ours: Median of the seconds with `base` threads / the seconds with more.
        peak: The same for the machine's peak: its rate with more threads / its rate with `base`.
    """

    base: int
    ours: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Measurement(AgainstPeak):
    """One row: a shape and dtype at one thread count.

    Attributes:
        scaling: Comparison with the shape's first thread count; `None` for that one itself.
    """

    scaling: Scaling | None


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("exact", ExactShape, settings.shapes), settings.pattern)


def _scaling(samples: Mapping[str, Sequence[float]], base: int, count: int) -> Scaling:
    return Scaling(
        base,
        ours=paired_ratio(samples[f"subquad/{base}"], samples[f"subquad/{count}"]),
        peak=paired_ratio(samples[f"peak/{count}"], samples[f"peak/{base}"]),
    )


def measure(shape: ExactShape, dtype: str, settings: Settings) -> list[Measurement]:
    """Measures a shape in one dtype, all its thread counts in turn, and checks its result at each.

    Args:
        shape: The shape.
        dtype: The element type.
        settings: How to measure.

    Returns:
        A measurement for each thread count.
    """
    inputs = tensors.make_inputs(shape, dtype, use_torch=settings.use_torch)
    ours = contenders.ours_call(shape, inputs)
    sdpa = contenders.sdpa_calls(shape, inputs) if settings.use_torch else None
    theirs = None if sdpa is None else sdpa[1]
    kind, level = contenders.peak_kind(dtype), str(_native.config()["level"])
    counts = shape.threads or (settings.threads,)
    field, checks = [], {}
    for count in counts:
        contenders.set_threads(count, use_torch=settings.use_torch)
        checks[count] = verify.check(shape, dtype, inputs, ours(), None if theirs is None else theirs())
        field.append(contenders.peak(kind, count, use_torch=settings.use_torch))
        field.append(contenders.attention("subquad", ours, count, use_torch=settings.use_torch))
        if theirs is not None:
            field.append(contenders.attention("torch", theirs, count, use_torch=settings.use_torch))
    samples = interleave(field, repeat=settings.repeat, time_budget=settings.time_budget)
    measurements = []
    for count in counts:
        seconds, peaks = samples[f"subquad/{count}"], samples[f"peak/{count}"]
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
                torch_ratio=None if theirs is None else paired_ratio(samples[f"torch/{count}"], seconds),
                scaling=None if count == counts[0] else _scaling(samples, counts[0], count),
                floor=requirements.share(shape.floor, dtype, count, level),
                error=checks[count].error,
                failure=checks[count].failure,
            )
        )
    return measurements


def _scaling_note(one: Measurement, scaling: Scaling) -> str:
    return (
        f"{one.shape.name}/{one.dtype}: {scaling.ours:.2f}x from {scaling.base} to {one.threads} threads; "
        f"the probe: {scaling.peak:.2f}x"
    )


def _row(one: Measurement) -> Sequence[str]:
    return (
        *one.cells(),
        "-" if one.torch_ratio is None else f"{one.torch_ratio:.2f}x",
        f"{one.error:.1e}",
        "WRONG" if one.failure else "ok",
    )


def _record(one: Measurement) -> Mapping[str, Value]:
    return {
        **one.record(),
        "scaling": None if one.scaling is None else one.scaling.ours,
        "peak_scaling": None if one.scaling is None else one.scaling.peak,
    }


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Measures the cases.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table, a line for each comparison of thread counts, and the wrong results.
    """
    title = f"Exact attention, useful GFLOP/s; level {_native.config()['level']}, {cpu_name()}"
    outcome = Outcome("exact", title, COLUMNS)
    possible = possible_cases(cases, settings, outcome)
    with progress.stage("exact", total=len(possible)) as stage:
        for shape, dtype in possible:
            measurements = measure(shape, dtype, settings)
            for one in measurements:
                outcome.add(one.case, _row(one), _record(one), one.failure)
                if one.scaling is not None:
                    outcome.notes.append(_scaling_note(one, one.scaling))
            shares = ", ".join(f"{one.peak_share:.1%} of peak" for one in measurements)
            stage.advance(f"{shape.name}/{dtype}: {shares}")
    if any(one["floor"] is not None for one in outcome.records):
        outcome.notes.append(against_peak.FLOOR_NOTE)
    return outcome
