"""The demo from start to end: prepare, measure, compare."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from subquad.cli.demo import quality, text, weights
from subquad.cli.demo.results import BASELINE, CANDIDATE, Comparison, DemoResult, DtypeResult, Figures
from subquad.cli.demo.rounds import MAX_ROUNDS, VARIANTS, Variants, measure_rounds
from subquad.cli.demo.run import Run
from subquad.cli.errors import CheckError, UserError
from subquad.cli.progress import Progress, open_progress

if TYPE_CHECKING:
    import torch


def _figures(runs: Sequence[Run]) -> Figures:
    decode = [run.decode_seconds for run in runs if run.decode_seconds is not None]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Figures(
        prefill_seconds=median(run.prefill_seconds for run in runs),
        decode_seconds=median(decode) if decode else None,
        peak_bytes=int(median(peaks)) if peaks else None,
        tokens=runs[0].tokens,
    )


def _agreement(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def _require_patched(runs: Mapping[str, Sequence[Run]], patch_report: Any) -> None:
    # Comparing SDPA with itself would pass every check.
    names = [{run.implementation for run in repeats} for repeats in runs.values()]
    if len(names) > 1 and (shared := set.intersection(*names)):
        raise CheckError(f"both runs used the attention {', '.join(sorted(shared))!r}")
    if patch_report.computed == 0:
        raise CheckError("the patched model never called subquad")


def _require_repeatable(runs: Mapping[str, Sequence[Run]], dtype: str) -> None:
    for name, repeats in runs.items():
        if len({run.tokens for run in repeats}) != 1:
            raise CheckError(f"{name} in {dtype} generated different tokens in different rounds")


def _compare(
    model: Any, prompt: "torch.Tensor", baseline: Sequence[Run], candidate: Sequence[Run]
) -> Comparison:
    pairs = list(zip(baseline, candidate, strict=True))
    decode = [
        old.decode_seconds / new.decode_seconds
        for old, new in pairs
        if old.decode_seconds is not None and new.decode_seconds is not None
    ]
    return Comparison(
        prefill_speedup=median(old.prefill_seconds / new.prefill_seconds for old, new in pairs),
        decode_speedup=median(decode) if decode else None,
        equal_tokens=_agreement(baseline[0].tokens, candidate[0].tokens),
        smallest_margin=min(baseline[0].margins),
        quality=quality.compare(model, prompt, baseline[0].hidden, candidate[0].hidden),
    )


def measure_dtype(
    model: Any,
    dtype: str,
    prompt: "torch.Tensor",
    new_tokens: int,
    *,
    time_budget: float,
    progress: Progress,
    variants: Variants = VARIANTS,
) -> DtypeResult:
    """Measures the variants on a loaded model and, if the baseline is among them, compares their results.

    Args:
        model: The model, loaded in `dtype`, unpatched.
        dtype: Its precision.
        prompt: Token ids, `[1, S]`.
        new_tokens: Tokens to generate.
        time_budget: Seconds for measuring.
        progress: Where to show progress.
        variants: What to enter around the runs of `CANDIDATE` and, unless it is left out, of `BASELINE`.

    Returns:
        The figures and the comparison.

    Raises:
        CheckError: The patch did not take effect, or a variant's tokens changed from round to round.
    """
    with progress.stage(f"{dtype}: running", total=(MAX_ROUNDS + 1) * len(variants)) as stage:
        runs, patch_report = measure_rounds(
            model, prompt, new_tokens, time_budget=time_budget, stage=stage, variants=variants
        )
    _require_patched(runs, patch_report)
    _require_repeatable(runs, dtype)
    baseline, candidate, comparison = runs.get(BASELINE), runs[CANDIDATE], None
    if baseline is not None:
        with progress.stage(f"{dtype}: comparing logits"):
            comparison = _compare(model, prompt, baseline, candidate)
    return DtypeResult(
        dtype=dtype,
        rounds=len(candidate),
        baseline=None if baseline is None else _figures(baseline),
        candidate=_figures(candidate),
        comparison=comparison,
        patch_report=str(patch_report),
    )


def _set_threads(threads: int | None) -> int:
    import torch

    import subquad

    count = subquad.get_num_threads() if threads is None else threads
    torch.set_num_threads(count)
    subquad.set_num_threads(count)
    return count


def _check_length(name: str, model: Any, total: int) -> None:
    limit = model.config.max_position_embeddings
    if total > limit:
        raise UserError(f"--tokens plus --new-tokens: {name} takes {limit} positions, got {total}")


def run(
    source: weights.Weights,
    *,
    dtypes: Sequence[str],
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
    time_budget: float,
    variants: Variants = VARIANTS,
) -> DemoResult:
    """Runs one model's part of the demo with progress on standard error.

    Args:
        source: The model.
        dtypes: Precisions, in order.
        prompt_tokens: Length of the prompt, at least 2.
        new_tokens: Tokens to generate.
        threads: Threads of torch and subquad; `None` for subquad's default.
        time_budget: Seconds for measuring, shared by the precisions.
        variants: As in `measure_dtype`.

    Returns:
        The results.

    Raises:
        UserError: The request cannot be met.
        CheckError: The patch did not take effect, or results changed from round to round.
    """
    if prompt_tokens < 2:
        raise UserError(f"--tokens: perplexity needs at least 2 tokens, got {prompt_tokens}")
    begin = time.perf_counter()
    weights.prepare_environment()
    with open_progress() as progress:
        with progress.stage("loading torch and transformers"):
            import torch
            import transformers  # noqa: F401

            count = _set_threads(threads)
        known = weights.is_converted(source)
        label = "checking the converted model" if known else "converting the model (once; up to a minute)"
        with progress.stage(f"{source.model.name}: {label}"):
            directory = weights.prepare(source)
        with progress.stage("reading the text"):
            prompt = torch.tensor([text.prompt_ids(weights.load_tokenizer(directory), prompt_tokens)])
        results, measured = [], 0.0
        for left, dtype in zip(range(len(dtypes), 0, -1), dtypes, strict=True):
            with progress.stage(f"{dtype}: loading the model"):
                model = weights.load_model(directory, dtype)
            _check_length(source.model.name, model, prompt_tokens + new_tokens)
            start = time.perf_counter()
            results.append(
                measure_dtype(
                    model,
                    dtype,
                    prompt,
                    new_tokens,
                    time_budget=(time_budget - measured) / left,
                    progress=progress,
                    variants=variants,
                )
            )
            measured += time.perf_counter() - start
            del model
    return DemoResult(
        model=source.model.name,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=count,
        seconds=time.perf_counter() - begin,
        dtypes=tuple(results),
    )
