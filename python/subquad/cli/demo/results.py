"""What the demo finds, as data: the figures of each variant and their comparison in each precision."""

from dataclasses import dataclass

from subquad.cli.demo.quality import Quality

BASELINE = "sdpa"
CANDIDATE = "subquad"


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of one variant; fields as in `Run`."""

    prefill_seconds: float
    decode_seconds: float | None
    peak_bytes: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """The patched model beside the unpatched one.

    Attributes:
        prefill_speedup: Median over rounds of baseline seconds / candidate seconds.
        decode_speedup: The same for decoding; `None` if one token was generated.
        equal_tokens: How many tokens are the same before the first that is not.
        smallest_margin: Smallest lead of a chosen token's logit over the second best, in the baseline.
        quality: Logits and perplexity.
    """

    prefill_speedup: float
    decode_speedup: float | None
    equal_tokens: int
    smallest_margin: float
    quality: Quality


@dataclass(frozen=True)
class DtypeResult:
    """What was found in one precision.

    Attributes:
        dtype: `"float32"` or `"bfloat16"`.
        rounds: How often each variant was measured.
        baseline: transformers' SDPA; `None` if it was left out.
        candidate: The patched model.
        comparison: Of the two; `None` if the baseline was left out.
        patch_report: What `subquad.hf.patch` says it replaced.
    """

    dtype: str
    rounds: int
    baseline: Figures | None
    candidate: Figures
    comparison: Comparison | None
    patch_report: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found about one model.

    Attributes:
        model: Its name.
        prompt_tokens: Length of the prompt.
        new_tokens: Number of generated tokens.
        threads: Threads of torch and of subquad.
        seconds: Duration of the model's part of the demo.
        dtypes: One result for each precision.
    """

    model: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    seconds: float
    dtypes: tuple[DtypeResult, ...]

    @property
    def passed(self) -> bool:
        """Whether the float32 tokens are the same (also true if nothing was compared in float32)."""
        return all(
            one.comparison.equal_tokens == self.new_tokens
            for one in self.dtypes
            if one.dtype == "float32" and one.comparison is not None
        )
