"""Benchmark of the smallest call: what a call costs before any arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from subquad.cli.bench import contenders, tensors, verify
from subquad.cli.bench.outcome import Outcome, Settings, Value
from subquad.cli.bench.shape_file import load, select
from subquad.cli.bench.shapes import LatencyShape
from subquad.cli.bench.timing import interleave
from subquad.cli.machine import cpu_name
from subquad.cli.progress import Progress
from subquad.cli.table import Column

Case = tuple[LatencyShape, str]

COLUMNS = (
    Column("shape", text=True),
    Column("dtype", text=True),
    Column("call", text=True),
    Column("us"),
    Column("limit us"),
    Column("check", text=True),
)


class _Call(NamedTuple):
    """A way of making the call: what is wrong with its result, and whether the limit is meant for it."""

    name: str
    function: Callable[[], Any]
    failure: str
    limited: bool


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("latency", LatencyShape, settings.shapes), settings.pattern)


def _calls(shape: LatencyShape, dtype: str, *, use_torch: bool) -> list[_Call]:
    """Returns the calls on NumPy arrays or on torch tensors, each tried once."""
    kind = "torch" if use_torch else "NumPy"
    limited = shape.limit_us > 0
    inputs = tensors.make_inputs(shape, dtype, use_torch=use_torch)
    ours = contenders.ours_call(shape, inputs)
    failure = verify.check(shape, dtype, inputs, ours(), None).failure
    calls = [_Call(f"subquad.attention, {kind}", ours, failure, limited)]
    sdpa = contenders.sdpa_calls(shape, inputs) if use_torch else None
    if sdpa is not None:
        ours, theirs = sdpa
        failure = verify.check(shape, dtype, inputs, ours().transpose(1, 2), theirs()).failure
        calls.append(_Call("subquad.scaled_dot_product_attention, torch", ours, failure, limited))
        calls.append(_Call("torch's own SDPA", theirs, "", limited=False))
    return calls


def _row(shape: LatencyShape, dtype: str, call: _Call, seconds: float) -> Sequence[str]:
    limit = f"{shape.limit_us:g}" if call.limited else "-"
    verdict = "ok" if call.limited else ""
    if call.failure:
        verdict = "WRONG"
    elif call.limited and seconds * 1e6 > shape.limit_us:
        verdict = "over"
    return (shape.name, dtype, call.name, f"{seconds * 1e6:.2f}", limit, verdict)


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Times each way of making the call.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table and the wrong results.
    """
    outcome = Outcome("latency", f"Smallest call, threads={settings.threads}, {cpu_name()}", COLUMNS)
    with progress.stage("latency", total=len(cases)) as stage:
        for shape, dtype in cases:
            contenders.set_threads(settings.threads, use_torch=settings.use_torch)
            calls = [] if tensors.numpy_dtype(dtype) is None else _calls(shape, dtype, use_torch=False)
            if settings.use_torch:
                calls += _calls(shape, dtype, use_torch=True)
            field = [
                contenders.attention(call.name, call.function, settings.threads, use_torch=settings.use_torch)
                for call in calls
            ]
            samples = interleave(field, repeat=settings.repeat, time_budget=settings.time_budget)
            for call, contender in zip(calls, field, strict=True):
                seconds = median(samples[contender.name])
                record: Mapping[str, Value] = {
                    "shape": shape.name,
                    "dtype": dtype,
                    "threads": settings.threads,
                    "call": call.name,
                    "seconds": seconds,
                    "limit": shape.limit_us * 1e-6 if call.limited else None,
                    "check": call.failure or "ok",
                }
                case = f"{shape.name}/{dtype}, {call.name}"
                outcome.add(case, _row(shape, dtype, call, seconds), record, call.failure)
            stage.advance(f"{shape.name}/{dtype}")
    return outcome
