"""Measuring the variants of one model in interleaved rounds."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from subquad.cli.demo.results import BASELINE, CANDIDATE
from subquad.cli.demo.run import Run, run_once
from subquad.cli.progress import Stage

if TYPE_CHECKING:
    import torch

MAX_ROUNDS = 3
_WARM_UP_PROMPT = 128
_WARM_UP_TOKENS = 4

Variants = Mapping[str, Callable[[Any], AbstractContextManager[Any]]]


def _patched(model: Any) -> AbstractContextManager[Any]:
    import subquad.hf

    handle: AbstractContextManager[Any] = subquad.hf.patch(model)
    return handle


def _unpatched(_model: Any) -> AbstractContextManager[Any]:
    return nullcontext()


VARIANTS: Variants = {BASELINE: _unpatched, CANDIDATE: _patched}


def _show(stage: Stage, name: str, detail: str) -> None:
    stage.show(f"{name}: {detail}")


def _describe(run: Run, name: str) -> str:
    decode = "" if run.decode_seconds is None else f", {run.decode_seconds * 1e3:.1f} ms/token"
    return f"{name}: prefill {run.prefill_seconds:.2f} s{decode}"


def measure_rounds(
    model: Any,
    prompt: "torch.Tensor",
    new_tokens: int,
    *,
    time_budget: float,
    stage: Stage,
    variants: Variants = VARIANTS,
) -> tuple[dict[str, list[Run]], Any]:
    """Measures every variant in turn, round after round, after a short warm-up of each.

    The order is reversed from round to round, so that no variant always runs on the warmer processor.

    Args:
        model: The model, unpatched.
        prompt: Token ids, `[1, S]`.
        new_tokens: Tokens to generate.
        time_budget: No round after the first is started that would, lasting as long as the longest, end after
            so many seconds.
        stage: Told of each run.
        variants: For each name, what to enter around its runs.

    Returns:
        The runs of each variant, one for each round, and what the patch reports after the last of its runs.
    """
    names, begin, longest = list(variants), time.perf_counter(), 0.0
    runs: dict[str, list[Run]] = {name: [] for name in names}
    patch_report = None
    for name in names:
        with variants[name](model) as handle:
            prefix, count = prompt[:, :_WARM_UP_PROMPT], min(new_tokens, _WARM_UP_TOKENS)
            run_once(model, prefix, count, patched=handle is not None)
        stage.advance(f"{name}: warm")
    for index in range(MAX_ROUNDS):
        start = time.perf_counter()
        if index > 0 and start - begin + longest > time_budget:
            break
        for name in names if index % 2 == 0 else reversed(names):
            with variants[name](model) as handle:
                run = run_once(
                    model,
                    prompt,
                    new_tokens,
                    patched=handle is not None,
                    show=partial(_show, stage, name),
                )
                if handle is not None:
                    patch_report = handle.report()
            runs[name].append(run)
            stage.advance(_describe(run, name))
        longest = max(longest, time.perf_counter() - start)
    return runs, patch_report
