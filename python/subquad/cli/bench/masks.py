"""Benchmark of masks: what is hidden must cost nothing, and modifiers of scores little.

Every call is held against plain ones in the same rounds. The ratio is of times for as much useful work: 1.25
is 80 % of the plain call's rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from subquad import _native
from subquad.cli.bench import contenders, mask_calls, requirements
from subquad.cli.bench.cases import possible_cases
from subquad.cli.bench.mask_shape import MaskShape
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.timing import interleave, paired_ratio
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[MaskShape, str]

COLUMNS = (
    Column("work", text=True),
    Column("dtype", text=True),
    Column("threads"),
    Column("ms"),
    Column("GFLOP/s"),
    Column("held against", text=True),
    Column("ratio"),
    Column("limit"),
    Column("vs torch"),
    Column("asked"),
    Column("error"),
    Column("check", text=True),
)


@dataclass(frozen=True)
class Measurement:
    """One row: a call in one dtype at one thread count.

    Attributes:
        shape: What was called.
        dtype: Its element type.
        threads: The thread count.
        seconds: Median of one call.
        against: What it is held against.
        ratio: Median of our seconds / those of what it is held against, for as much work, each pair from one
            round.
        limit: The most that is accepted, if anything.
        torch_ratio: Median of torch's seconds / ours, each pair from one round; `None` without torch.
        torch_floor: The least that is asked for, if anything.
        error: Largest absolute error of the rows that were checked.
        failure: What is wrong with the result; empty if nothing.
    """

    shape: MaskShape
    dtype: str
    threads: int
    seconds: float
    against: str
    ratio: float
    limit: float | None
    torch_ratio: float | None
    torch_floor: float | None
    error: float
    failure: str

    @property
    def useful_rate(self) -> float:
        """Useful flops per second."""
        return self.shape.useful_flops / self.seconds


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("masks", MaskShape, settings.shapes), settings.pattern)


def _plain_name(shape: MaskShape) -> str:
    return f"plain {shape.name}"


def _costs(shape: MaskShape, samples: Mapping[str, Sequence[float]], count: int) -> dict[str, list[float]]:
    """Returns the seconds of our calls for one unit of work, by the call's name, one for each round."""
    if shape.layout == "apart":
        work = {call.name: call.queries for call in shape.calls()}
    else:
        work = {call.name: call.useful_flops for call in shape.calls()}
        work[_plain_name(shape)] = sum(part.useful_flops for part in shape.plain())
    return {name: [each / units for each in samples[f"{name}/{count}"]] for name, units in work.items()}


def measure(shape: MaskShape, dtype: str, settings: Settings) -> list[Measurement]:
    """Measures the calls of a shape in one dtype, all its thread counts in turn, and checks their results.

    Args:
        shape: The shape.
        dtype: The element type.
        settings: How to measure.

    Returns:
        A measurement for each thread count and call.
    """
    made = mask_calls.make(shape, dtype, use_torch=settings.use_torch)
    counts = shape.threads or (settings.threads,)
    field, checks = [], {}
    for count in counts:
        contenders.set_threads(count, use_torch=settings.use_torch)
        timed = {call.shape.name: (call.ours, False) for call in made.calls}
        for call in made.calls:
            checks[call.shape.name, count] = call.check(dtype)
            if call.theirs is not None:
                timed[f"torch {call.shape.name}"] = call.theirs, call.theirs_is_slow
        if made.plain is not None:
            timed[_plain_name(shape)] = made.plain, False
        field += [
            contenders.attention(name, function, count, use_torch=settings.use_torch, is_slow=is_slow)
            for name, (function, is_slow) in timed.items()
        ]
    samples = interleave(field, repeat=settings.repeat, time_budget=settings.time_budget)
    measurements = []
    for count in counts:
        costs = _costs(shape, samples, count)
        plain, cheapest = _plain_name(shape), min(costs, key=lambda name: median(costs[name]))
        base = costs[cheapest if made.plain is None else plain]
        for call in made.calls:
            name = call.shape.name
            seconds, theirs = samples[f"{name}/{count}"], samples.get(f"torch {name}/{count}")
            measurements.append(
                Measurement(
                    shape=call.shape,
                    dtype=dtype,
                    threads=count,
                    seconds=median(seconds),
                    against=shape.against,
                    ratio=paired_ratio(costs[name], base),
                    limit=requirements.limit(call.shape.limit, count),
                    torch_ratio=None if theirs is None else paired_ratio(theirs, seconds[: len(theirs)]),
                    torch_floor=requirements.limit(call.shape.torch_floor.get(dtype), count),
                    error=checks[name, count].error,
                    failure=checks[name, count].failure,
                )
            )
    return measurements


def _row(one: Measurement) -> Sequence[str]:
    absent = "-"
    return (
        one.shape.name,
        one.dtype,
        str(one.threads),
        f"{one.seconds * 1e3:.3f}",
        f"{one.useful_rate / 1e9:.0f}",
        one.against,
        requirements.at_most(f"{one.ratio:.3f}", one.ratio, one.limit),
        absent if one.limit is None else f"{one.limit:g}",
        *requirements.ratio(one.torch_ratio, one.torch_floor),
        f"{one.error:.1e}",
        "WRONG" if one.failure else "ok",
    )


def _record(one: Measurement) -> Mapping[str, Value]:
    return {
        "shape": one.shape.name,
        "dtype": one.dtype,
        "threads": one.threads,
        "seconds": one.seconds,
        "useful_flops": one.shape.useful_flops,
        "torch_ratio": one.torch_ratio,
        "torch_floor": one.torch_floor,
        "against": one.against,
        "against_ratio": one.ratio,
        "against_limit": one.limit,
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
        The table and the wrong results.
    """
    title = f"Masks and modifiers, useful GFLOP/s; level {_native.config()['level']}, {cpu_name()}"
    outcome = Outcome("masks", title, COLUMNS)
    possible = possible_cases(cases, settings, outcome)
    with progress.stage("masks", total=len(possible)) as stage:
        for shape, dtype in possible:
            measurements = measure(shape, dtype, settings)
            for one in measurements:
                case = f"{one.shape.name}/{dtype}, threads={one.threads}"
                outcome.add(case, _row(one), _record(one), one.failure)
            ratios = ", ".join(f"{one.ratio:.3f}" for one in measurements)
            stage.advance(f"{shape.name}/{dtype}: {ratios} of the time of {shape.against}")
    if outcome.records:
        outcome.notes.append(
            "ratio: to the time of what it is held against, for as much useful work (for as many tokens, where "
            "lengths are compared); limit and asked: what is accepted with two threads; ! is what misses it"
        )
    return outcome
