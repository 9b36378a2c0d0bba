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
    quality: Quality
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
