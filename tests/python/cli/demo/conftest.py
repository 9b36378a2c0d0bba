"""Tiny language models, and stand-ins for the variants."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

from subquad.cli.demo.quality import Quality
from subquad.cli.demo.results import BASELINE, CANDIDATE, Comparison, DemoResult, DtypeResult, Figures

VOCABULARY = 97


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Spares the collection of garbage before each run, which takes most of a test's time here."""
    monkeypatch.setattr("subquad.cli.peak_memory.release_free_memory", lambda: None)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Makes a random model of a few thousand weights, always the same one; a Gemma's window is 8 tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(dtype: str = "float32", *, family: str = "llama") -> Any:
        torch.manual_seed(3)
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "max_position_embeddings": 600,
            "initializer_range": 0.5,
            "attn_implementation": "sdpa",
        }
        if family == "gemma":
            config = transformers.Gemma3TextConfig(
                **shape,
                num_hidden_layers=3,
                num_key_value_heads=1,
                head_dim=8,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        else:
            config = transformers.LlamaConfig(**shape, num_hidden_layers=2, num_key_value_heads=2)
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model.to(getattr(torch, dtype)).eval()

    return make


@pytest.fixture
def model(make_model) -> Any:
    return make_model()


@pytest.fixture
def prompt(model) -> Any:
    import torch

    return torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(5))


@dataclass
class Report:
    """As `subquad.hf.Patch.report()` gives it."""

    computed: int = 3

    def __str__(self) -> str:
        return "Llama: patched\n  replaced: LlamaAttention x2"


class Fake:
    """Stands in for `subquad.hf.patch`: another attention of transformers', and what a test wants changed.

    Attributes:
        log: What was entered and left, in order.
        change: Called with the model on entry; returns what undoes it.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.implementation = "eager"
        self.computed = 3
        self.change: Callable[[Any], Callable[[], None]] = lambda _model: lambda: None

    @contextmanager
    def patch(self, model: Any):
        original = model.config._attn_implementation
        model.config._attn_implementation = self.implementation
        undo = self.change(model)
        self.log.append(CANDIDATE)
        try:
            yield self
        finally:
            undo()
            model.config._attn_implementation = original

    def unpatched(self, _model: Any):
        self.log.append(BASELINE)
        return nullcontext()

    def report(self) -> Report:
        return Report(self.computed)

    @property
    def variants(self) -> dict[str, Callable[[Any], Any]]:
        return {BASELINE: self.unpatched, CANDIDATE: self.patch}


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def other_tokens(fake) -> None:
    """Makes the patched model choose other tokens."""

    def change(model: Any) -> Callable[[], None]:
        weight = model.get_output_embeddings().weight.data
        weight.neg_()
        return weight.neg_

    fake.change = change


@pytest.fixture
def make_result() -> Callable[..., DemoResult]:
    """Makes a result of one model: by default one that passed, in both precisions."""
    same = Quality(4096, 14.25, 14.26, 1.5e-4, 2.5e-5)

    def make(*, equal: int = 64, quality: Quality = same, **changes: Any) -> DemoResult:
        def one(dtype: str, equal_tokens: int) -> DtypeResult:
            fields: dict[str, Any] = {
                "dtype": dtype,
                "rounds": 3,
                "baseline": Figures(12.5, 0.0412, 300 << 20, tuple(range(64))),
                "candidate": Figures(5.0, 0.0206, 150 << 20, tuple(range(64))),
                "comparison": Comparison(2.5, 2.0, equal_tokens, 0.0123, quality),
                "patch_report": "Llama: patched\n  replaced: LlamaAttention x30",
            }
            return DtypeResult(**{**fields, **changes})

        dtypes = (one("float32", equal), one("bfloat16", 40))
        return DemoResult("Tiny-1M", 4096, 64, 2, 200.0, dtypes)

    return make
