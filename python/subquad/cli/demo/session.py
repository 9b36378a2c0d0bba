"""The demo from start to end: prepare, warm up, measure in interleaved rounds, compare."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from subquad.cli.demo import quality, text, weights
from subquad.cli.demo.run import Run, run_once
from subquad.cli.errors import UserError
from subquad.cli.progress import Progress, Stage, open_progress

if TYPE_CHECKING:
    import torch

BASELINE = "sdpa"
CANDIDATE = "subquad"
_MAX_ROUNDS = 3
_WARM_UP_PROMPT = 128
_WARM_UP_TOKENS = 4

Variants = Mapping[str, Callable[[Any], AbstractContextManager[Any]]]


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of one variant; fields as in `Run`."""

    prefill_seconds: float
    decode_seconds: float | None
    peak_bytes: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class DtypeResult:
    """The comparison in one precision.

    Attributes:
        dtype: `"float32"` or `"bfloat16"`.
        rounds: How often each variant was measured.
        baseline: transformers' SDPA.
        candidate: The patched model.
        prefill_speedup: Median over rounds of baseline seconds / candidate seconds.
        decode_speedup: The same for decoding; `None` if one token was generated.
        equal_tokens: How many tokens are the same before the first that is not.
        smallest_margin: Smallest lead of a chosen token's logit over the second best, in the baseline.
        quality: Logits and perplexity.
        patch_report: What `subquad.hf.patch` says it replaced.
    """

    dtype: str
    rounds: int
    baseline: Figures
    candidate: Figures
    prefill_speedup: float
    decode_speedup: float | None
    equal_tokens: int
    smallest_margin: float
    quality: quality.Quality
    patch_report: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Attributes:
        prompt_tokens: Length of the prompt.
        new_tokens: Number of generated tokens.
        threads: Threads of torch and of subquad.
        seconds: Duration of the whole demo.
        dtypes: One comparison for each precision.
    """

    prompt_tokens: int
    new_tokens: int
    threads: int
    seconds: float
    dtypes: tuple[DtypeResult, ...]

    @property
    def passed(self) -> bool:
        """Whether the float32 tokens are the same (also true if float32 was not run)."""
        return all(one.equal_tokens == self.new_tokens for one in self.dtypes if one.dtype == "float32")


def _patched(model: Any) -> AbstractContextManager[Any]:
    import subquad.hf

    handle: AbstractContextManager[Any] = subquad.hf.patch(model)
    return handle


def _unpatched(_model: Any) -> AbstractContextManager[Any]:
    return nullcontext()


VARIANTS: Variants = {BASELINE: _unpatched, CANDIDATE: _patched}


def _agreement(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def _figures(runs: Sequence[Run]) -> Figures:
    decode = [run.decode_seconds for run in runs if run.decode_seconds is not None]
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return Figures(
        prefill_seconds=median(run.prefill_seconds for run in runs),
        decode_seconds=median(decode) if decode else None,
        peak_bytes=int(median(peaks)) if peaks else None,
        tokens=runs[0].tokens,
    )


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
) -> tuple[dict[str, list[Run]], str]:
    """Measures every variant in turn, round after round, after a short warm-up of each.

    The order is reversed from round to round, so that no variant always runs on the warmer processor.

    Args:
        model: The model, unpatched.
        prompt: Token ids, `[1, S]`.
        new_tokens: Tokens to generate.
        time_budget: No round is started that would, lasting as long as the longest, end after so many
            seconds.
        stage: Told of each run.
        variants: For each name, what to enter around its runs.

    Returns:
        The runs of each variant, one for each round, and the report of the patch.
    """
    names, begin, longest = list(variants), time.perf_counter(), 0.0
    runs: dict[str, list[Run]] = {name: [] for name in names}
    patch_report = ""
    for name in names:
        with variants[name](model) as handle:
            run_once(model, prompt[:, :_WARM_UP_PROMPT], min(new_tokens, _WARM_UP_TOKENS))
            if handle is not None:
                patch_report = str(handle.report())
        stage.advance(f"{name}: warm")
    for index in range(_MAX_ROUNDS):
        start = time.perf_counter()
        if index > 0 and start - begin + longest > time_budget:
            break
        for name in names if index % 2 == 0 else reversed(names):
            with variants[name](model):
                run = run_once(model, prompt, new_tokens)
            runs[name].append(run)
            stage.advance(_describe(run, name))
        longest = max(longest, time.perf_counter() - start)
    return runs, patch_report


def _require_patched(runs: Mapping[str, Sequence[Run]]) -> None:
    # Comparing SDPA with itself would pass every check.
    if runs[CANDIDATE][0].implementation == runs[BASELINE][0].implementation:
        raise RuntimeError("subquad.hf.patch left the model's attention as it was")


def compare_dtype(
    model: Any, dtype: str, prompt: "torch.Tensor", new_tokens: int, *, time_budget: float, progress: Progress
) -> DtypeResult:
    """Measures both variants on a loaded model and compares their results.

    Args:
        model: The model, loaded in `dtype`, unpatched.
        dtype: Its precision.
        prompt: Token ids, `[1, S]`.
        new_tokens: Tokens to generate.
        time_budget: Seconds for measuring.
        progress: Where to show progress.

    Returns:
        The comparison.

    Raises:
        RuntimeError: The patch did not take effect, or a variant's tokens changed from round to round.
    """
    with progress.stage(f"{dtype}: running", total=(_MAX_ROUNDS + 1) * len(VARIANTS)) as stage:
        runs, patch_report = measure_rounds(model, prompt, new_tokens, time_budget=time_budget, stage=stage)
    _require_patched(runs)
    for name, repeats in runs.items():
        if len({run.tokens for run in repeats}) != 1:
            raise RuntimeError(f"{name} in {dtype} generated different tokens in different rounds")
    baseline, candidate = runs[BASELINE], runs[CANDIDATE]
    with progress.stage(f"{dtype}: comparing logits"):
        compared = quality.compare(model, prompt, baseline[0].hidden, candidate[0].hidden)
    decode = [
        old.decode_seconds / new.decode_seconds
        for old, new in zip(baseline, candidate, strict=True)
        if old.decode_seconds is not None and new.decode_seconds is not None
    ]
    return DtypeResult(
        dtype=dtype,
        rounds=len(baseline),
        baseline=_figures(baseline),
        candidate=_figures(candidate),
        prefill_speedup=median(
            old.prefill_seconds / new.prefill_seconds for old, new in zip(baseline, candidate, strict=True)
        ),
        decode_speedup=median(decode) if decode else None,
        equal_tokens=_agreement(baseline[0].tokens, candidate[0].tokens),
        smallest_margin=min(baseline[0].margins),
        quality=compared,
        patch_report=patch_report,
    )


def _set_threads(threads: int | None) -> int:
    import torch

    import subquad

    count = subquad.get_num_threads() if threads is None else threads
    torch.set_num_threads(count)
    subquad.set_num_threads(count)
    return count


def _check_length(model: Any, total: int) -> None:
    limit = model.config.max_position_embeddings
    if total > limit:
        raise UserError(f"--tokens plus --new-tokens: the model takes {limit} positions, got {total}")


def run(
    *, dtypes: Sequence[str], prompt_tokens: int, new_tokens: int, threads: int | None, time_budget: float
) -> DemoResult:
    """Runs the demo with progress on standard error.

    Args:
        dtypes: Precisions, in order.
        prompt_tokens: Length of the prompt, at least 2.
        new_tokens: Tokens to generate.
        threads: Threads of torch and subquad; `None` for subquad's default.
        time_budget: Seconds for measuring, shared by the precisions.

    Returns:
        The results.

    Raises:
        UserError: The request cannot be met.
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
        source = weights.locate()
        known = weights.is_converted(source)
        label = (
            "checking the converted model" if known else "converting the model (once; about half a minute)"
        )
        with progress.stage(label):
            directory = weights.prepare(source)
        with progress.stage("reading the text"):
            prompt = torch.tensor([text.prompt_ids(weights.load_tokenizer(directory), prompt_tokens)])
        results, measured = [], 0.0
        for left, dtype in zip(range(len(dtypes), 0, -1), dtypes, strict=True):
            with progress.stage(f"{dtype}: loading the model"):
                model = weights.load_model(directory, dtype)
            _check_length(model, prompt_tokens + new_tokens)
            start = time.perf_counter()
            share = (time_budget - measured) / left
            results.append(
                compare_dtype(model, dtype, prompt, new_tokens, time_budget=share, progress=progress)
            )
            measured += time.perf_counter() - start
            del model
    return DemoResult(prompt_tokens, new_tokens, count, time.perf_counter() - begin, tuple(results))
