"""Benchmark of exact attention, prefill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from subquad import _native
from subquad.cli.bench import contenders, requirements, tensors, verify
from subquad.cli.bench.cases import possible_cases
from subquad.cli.bench.outcome import Outcome, Settings
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.shapes import ExactShape
from subquad.cli.bench.timing import interleave, paired_ratio
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[ExactShape, str]

COLUMNS = (
    Column("shape", text=True),
    Column("dtype", text=True),
    Column("threads"),
    Column("ms"),
    Column("GFLOP/s"),
    Column("peak"),
    Column("of peak"),
    Column("floor"),
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


@dataclass(frozen=True)
class Measurement:
    """One row: a shape and dtype at one thread count.

    Attributes:
        shape: The shape.
        dtype: Its element type.
        threads: The thread count.
        seconds: Median of one call.
        peak_flops: Median of the machine's peak, flops per second.
        peak_kind: What that peak is of: `"f32"`, `"f64"` or `"bf16"`.
        peak_share: Median of useful flops per second / peak, each pair from one round.
        torch_ratio: Median of torch's seconds / ours, each pair from one round; `None` without torch.
        scaling: Comparison with the shape's first thread count; `None` for that one itself.
        floor: Least share that is asked for at this level and thread count, if any.
        error: Largest absolute error of the rows that were checked.
        failure: What is wrong with the result; empty if nothing.
    """

    shape: ExactShape
    dtype: str
    threads: int
    seconds: float
    peak_flops: float
    peak_kind: str
    peak_share: float
    torch_ratio: float | None
    scaling: Scaling | None
    floor: float | None
    error: float
    failure: str

    @property
    def useful_rate(self) -> float:
        """Useful flops per second."""
        return self.shape.useful_flops / self.seconds


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
        one.shape.name,
        one.dtype,
        str(one.threads),
        f"{one.seconds * 1e3:.3f}",
        f"{one.useful_rate / 1e9:.0f}",
        f"{one.peak_flops / 1e9:.0f} {one.peak_kind}",
        requirements.at_least(f"{one.peak_share:.1%}", one.peak_share, one.floor),
        "-" if one.floor is None else f"{one.floor:.0%}",
        "-" if one.torch_ratio is None else f"{one.torch_ratio:.2f}x",
        f"{one.error:.1e}",
        "WRONG" if one.failure else "ok",
    )


def _record(one: Measurement) -> Mapping[str, str | float | int | None]:
    return {
        "shape": one.shape.name,
        "dtype": one.dtype,
        "threads": one.threads,
        "seconds": one.seconds,
        "useful_flops": one.shape.useful_flops,
        "peak_flops": one.peak_flops,
        "peak_kind": one.peak_kind,
        "peak_share": one.peak_share,
        "torch_ratio": one.torch_ratio,
        "scaling": None if one.scaling is None else one.scaling.ours,
        "peak_scaling": None if one.scaling is None else one.scaling.peak,
        "floor": one.floor,
        "error": one.error,
        "check": one.failure or "ok",
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
                case = f"{shape.name}/{dtype}, threads={one.threads}"
                outcome.add(case, _row(one), _record(one), one.failure)
                if one.scaling is not None:
                    outcome.notes.append(_scaling_note(one, one.scaling))
            shares = ", ".join(f"{one.peak_share:.1%} of peak" for one in measurements)
            stage.advance(f"{shape.name}/{dtype}: {shares}")
    if any(one["floor"] is not None for one in outcome.records):
        outcome.notes.append(
            "floor: the least share of the peak that is accepted with two threads; ! is below it"
        )
    return outcome
