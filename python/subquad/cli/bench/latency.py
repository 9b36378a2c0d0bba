"""Benchmark of the smallest call: what a call costs before any arithmetic."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from subquad.cli.bench import contenders, tensors, verify
from subquad.cli.bench.outcome import Outcome, Settings
from subquad.cli.bench.shapes import LatencyShape, load, select
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
_TORCH = "torch's own SDPA"


def plan(settings: Settings) -> list[Case]:
    """Returns the shapes and dtypes that the settings select."""
    return select(load("latency", LatencyShape, settings.shapes), settings.pattern)


def _calls(
    shape: LatencyShape, dtype: str, settings: Settings
) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    calls: dict[str, Callable[[], Any]] = {}
    failures = []
    kinds = {"NumPy": False, "torch": True} if settings.use_torch else {"NumPy": False}
    for kind, use_torch in kinds.items():
        if not use_torch and tensors.numpy_dtype(dtype) is None:
            continue
        inputs = tensors.make_inputs(shape, dtype, use_torch=use_torch)
        name = f"subquad.attention, {kind}"
        calls[name] = contenders.ours_call(shape, inputs)
        if failure := verify.check(shape, dtype, inputs, calls[name](), None).failure:
            failures.append(f"{shape.name}/{dtype}, {name}: {failure}")
        if use_torch:
            calls["subquad.scaled_dot_product_attention, torch"] = contenders.ours_sdpa_call(shape, inputs)
            theirs = contenders.torch_call(shape, inputs)
            if theirs is not None:
                calls[_TORCH] = theirs
    return calls, failures


def run(cases: Sequence[Case], settings: Settings, progress: Progress) -> Outcome:
    """Times each way of making the call.

    Args:
        cases: Shapes and dtypes.
        settings: How to measure.
        progress: Told of each.

    Returns:
        The table and the wrong results.
    """
    outcome = Outcome("latency", f"Smallest call, {settings.threads} threads, {cpu_name()}", COLUMNS)
    with progress.stage("latency", total=len(cases)) as stage:
        for shape, dtype in cases:
            calls, failures = _calls(shape, dtype, settings)
            outcome.failures += failures
            field = [
                contenders.attention(name, call, settings.threads, use_torch=settings.use_torch)
                for name, call in calls.items()
            ]
            samples = interleave(field, repeat=settings.repeat, time_budget=settings.time_budget)
            for name in calls:
                seconds = median(samples[f"{name}/{settings.threads}"])
                limited = shape.limit_us > 0 and name != _TORCH
                within = not limited or seconds * 1e6 <= shape.limit_us
                verdict = "" if not limited else "ok" if within else "over"
                limit = f"{shape.limit_us:g}" if limited else "-"
                outcome.rows.append((shape.name, dtype, name, f"{seconds * 1e6:.2f}", limit, verdict))
                outcome.records.append(
                    {
                        "shape": shape.name,
                        "dtype": dtype,
                        "threads": settings.threads,
                        "call": name,
                        "seconds": seconds,
                        "limit": shape.limit_us * 1e-6 if limited else None,
                    }
                )
            stage.advance(f"{shape.name}/{dtype}")
    return outcome
