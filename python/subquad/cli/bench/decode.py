"""Benchmark of decoding: few queries against a long cache, which costs what reading the cache costs.

The probe that it is held against is a plain sum over what the calls read in turn: all copies of the cache
together, more than the processor's own caches hold. A shape that is `hot` has one cache only;
if it is small it stays in the processor's, as what is small does between the steps of a decoder, and the
time is that of everything but the memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from subquad import _native
from subquad.cli.bench import contenders, decode_calls, requirements, verify
from subquad.cli.bench.cases import possible_cases
from subquad.cli.bench.decode_shape import DecodeShape
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.timing import interleave, paired_ratio
from subquad.cli.errors import UserError
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[DecodeShape, str]

COLUMNS = (
    Column("shape", text=True),
    Column("dtype", text=True),
    Column("threads"),
    Column("us"),
    Column("limit us"),
    Column("GB/s"),
    Column("of read"),
    Column("floor"),
    Column("vs torch"),
    Column("asked"),
    Column("vs shape"),
    Column("limit"),
    Column("error"),
    Column("check", text=True),
)


@dataclass(frozen=True)
class Required:
    """What is asked for at one thread count; `None` for nothing.

    Attributes:
        read_share: Least share of the read bandwidth.
        torch_ratio: Least ratio to torch.
        seconds: Most seconds of a call.
        shape_ratio: Most that a call may take as a multiple of the other shape's time.
    """

    read_share: float | None
    torch_ratio: float | None
    seconds: float | None
    shape_ratio: float | None


@dataclass(frozen=True)
class Measurement:
    """One row: a shape and dtype at one thread count.

    Attributes:
        shape: The shape.
        dtype: Its element type.
        threads: The thread count.
        seconds: Median of one call.
        read_rate: Median of the probe of reading, bytes per second.
        read_share: Median of the call's bytes per second / the probe's, each pair from one round.
        torch_ratio: Median of torch's seconds / ours, each pair from one round; `None` without torch.
        shape_ratio: Median of our seconds / the other shape's, each pair from one round; `None` without one.
        required: What is asked for.
        error: Largest absolute error of the rows that were checked.
        failure: What is wrong with the result; empty if nothing.
    """

    shape: DecodeShape
    dtype: str
    threads: int
    seconds: float
    read_rate: float
    read_share: float
    torch_ratio: float | None
    shape_ratio: float | None
    required: Required
    error: float
    failure: str

    @property
    def rate(self) -> float:
        """Bytes of keys and values per second."""
        return self.shape.read_bytes(self.dtype) / self.seconds


def _shapes(settings: Settings) -> dict[str, DecodeShape]:
    shapes = {shape.name: shape for shape in load("decode", DecodeShape, settings.shapes)}
    for shape in shapes.values():
        other = shapes.get(shape.against)
        if shape.against and (other is None or set(shape.dtypes) - set(other.dtypes)):
            raise UserError(
                f"{settings.shapes}: decode {shape.name}: against must name another decode shape that has "
                f"all of its dtypes, got {shape.against!r}"
            )
    return shapes


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select.

    Raises:
        UserError: The file is wrong, or a shape is against one that there is not.
    """
    return select(tuple(_shapes(settings).values()), settings.pattern)


def _required(shape: DecodeShape, dtype: str, threads: int) -> Required:
    level = str(_native.config()["level"])
    return Required(
        read_share=requirements.share(shape.floor, dtype, threads, level),
        torch_ratio=requirements.limit(shape.torch_floor.get(dtype), threads),
        seconds=requirements.limit(shape.limit_us * 1e-6, threads),
        shape_ratio=requirements.limit(shape.limit_ratio, threads),
    )


def measure(
    shape: DecodeShape, other: DecodeShape | None, dtype: str, settings: Settings
) -> list[Measurement]:
    """Measures a shape in one dtype, all its thread counts in turn, and checks its result at each.

    Args:
        shape: The shape.
        other: The one that it is against, measured in the same rounds; its result is not checked here.
        dtype: The element type.
        settings: How to measure.

    Returns:
        A measurement for each thread count.
    """
    calls = decode_calls.make(shape, dtype, use_torch=settings.use_torch)
    timed = {"subquad": calls.ours}
    if calls.theirs is not None:
        timed["torch"] = calls.theirs
    if other is not None:
        timed["against"] = decode_calls.make(other, dtype, use_torch=settings.use_torch).ours
    counts = shape.threads or (settings.threads,)
    field, checks = [], {}
    for count in counts:
        contenders.set_threads(count, use_torch=settings.use_torch)
        theirs = None if calls.theirs is None else calls.theirs()
        checks[count] = verify.check(shape, dtype, calls.inputs, calls.ours(), theirs)
        field.append(contenders.read(calls.memory, count, use_torch=settings.use_torch))
        field += [
            contenders.attention(name, call, count, use_torch=settings.use_torch)
            for name, call in timed.items()
        ]
    samples = interleave(field, repeat=settings.repeat, time_budget=settings.time_budget)
    measurements = []
    for count in counts:
        seconds, reads = samples[f"subquad/{count}"], samples[f"read/{count}"]
        rates = [shape.read_bytes(dtype) / each for each in seconds]
        measurements.append(
            Measurement(
                shape=shape,
                dtype=dtype,
                threads=count,
                seconds=median(seconds),
                read_rate=median(reads),
                read_share=paired_ratio(rates, reads),
                torch_ratio=None
                if "torch" not in timed
                else paired_ratio(samples[f"torch/{count}"], seconds),
                shape_ratio=None if other is None else paired_ratio(seconds, samples[f"against/{count}"]),
                required=_required(shape, dtype, count),
                error=checks[count].error,
                failure=checks[count].failure,
            )
        )
    return measurements


def _row(one: Measurement) -> Sequence[str]:
    required, absent = one.required, "-"
    return (
        one.shape.name,
        one.dtype,
        str(one.threads),
        requirements.at_most(f"{one.seconds * 1e6:.1f}", one.seconds, required.seconds),
        absent if required.seconds is None else f"{required.seconds * 1e6:g}",
        f"{one.rate / 1e9:.1f}",
        requirements.at_least(f"{one.read_share:.1%}", one.read_share, required.read_share),
        absent if required.read_share is None else f"{required.read_share:.0%}",
        *requirements.ratio(one.torch_ratio, required.torch_ratio),
        absent
        if one.shape_ratio is None
        else requirements.at_most(f"{one.shape_ratio:.2f}x", one.shape_ratio, required.shape_ratio),
        absent if required.shape_ratio is None else f"{required.shape_ratio:g}x",
        f"{one.error:.1e}",
        "WRONG" if one.failure else "ok",
    )


def _record(one: Measurement) -> Mapping[str, Value]:
    return {
        "shape": one.shape.name,
        "dtype": one.dtype,
        "threads": one.threads,
        "seconds": one.seconds,
        "peak_kind": "read",
        "peak_share": one.read_share,
        "torch_ratio": one.torch_ratio,
        "floor": one.required.read_share,
        "bytes": one.shape.read_bytes(one.dtype),
        "limit": one.required.seconds,
        "peak_read": one.read_rate,
        "torch_floor": one.required.torch_ratio,
        "against": one.shape.against or None,
        "against_ratio": one.shape_ratio,
        "against_limit": one.required.shape_ratio,
        "error": one.error,
        "check": one.failure or "ok",
    }


def _shape_note(one: Measurement, ratio: float) -> str:
    return (
        f"{one.shape.name}/{one.dtype}, threads={one.threads}: {ratio:.2f}x the time of {one.shape.against}"
    )


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Measures the cases.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table, a line for each comparison with another shape, and the wrong results.
    """
    title = f"Decoding with a cache; level {_native.config()['level']}, {cpu_name()}"
    outcome = Outcome("decode", title, COLUMNS)
    possible = possible_cases(cases, settings, outcome)
    others = _shapes(settings) if any(shape.against for shape, _ in possible) else {}
    with progress.stage("decode", total=len(possible)) as stage:
        for shape, dtype in possible:
            measurements = measure(shape, others.get(shape.against), dtype, settings)
            for one in measurements:
                case = f"{shape.name}/{dtype}, threads={one.threads}"
                outcome.add(case, _row(one), _record(one), one.failure)
                if one.shape_ratio is not None:
                    outcome.notes.append(_shape_note(one, one.shape_ratio))
            shares = ", ".join(f"{one.read_share:.1%} of read" for one in measurements)
            stage.advance(f"{shape.name}/{dtype}: {shares}")
    if outcome.records:
        outcome.notes.append(
            "floor, asked and the limits: what is accepted with two threads; ! is what misses it"
        )
    return outcome
