"""Tiny random models, and what every test of `subquad.hf` has to leave behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest

if find_spec("transformers") is None or find_spec("torch") is None:
    collect_ignore_glob = ["*"]
else:
    import torch
    import transformers
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    transformers.logging.set_verbosity_error()

VOCABULARY = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # With the usual 0.02, attention is nearly uniform and a lost mask hardly changes the logits.
    "initializer_range": 0.25,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
# With random weights, and embeddings of Gemma's scale, the next token would be the last one again.
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
_PHI: dict[str, Any] = {"num_key_value_heads": 2, "original_max_position_embeddings": 256}
_WINDOW = 8

# Name for tests: model type, sizes that differ.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": None}),
    "mistral-window": ("mistral", {**_GROUPED, "sliding_window": _WINDOW}),
    "phi3": ("phi3", {**_PHI, "sliding_window": None}),
    "phi3-window": ("phi3", {**_PHI, "sliding_window": _WINDOW}),
    "gemma2": ("gemma2", {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": _WINDOW}),
    "gemma3": (
        "gemma3_text",
        {
            **_GROUPED,
            **_UNTIED,
            "query_pre_attn_scalar": 8,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": _WINDOW},
    ),
    "inkling2": (
        "inkling2_text",
        {
            **_GROUPED,
            **_UNTIED,
            "unpadded_vocab_size": VOCABULARY,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": _WINDOW,
            "d_rel": 4,
            "rel_extent": _WINDOW,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_layers_per_attn_res_block": 1,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    "deepseek-v3": ("deepseek_v3", _LATENT),
    "deepseek-v3.2": (
        "deepseek_v32",
        {**_LATENT, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "minimax-m3": (
        "minimax_m3_vl_text",
        {
            **_GROUPED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_local_blocks": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **_GROUPED,
            **_UNTIED,
            "intermediate_size": [48, 48, 48],
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": _WINDOW,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "activation_sparsity_pattern": [0.0, 0.0, 0.0],
            "laurel_rank": 4,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **_GROUPED,
            **_UNTIED,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 128,
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_global_key_value_heads": 2,
            "global_head_dim": 8,
        },
    ),
}


def build(name: str, **overrides: Any) -> Any:
    """Builds a decoder of `DECODERS` with random weights, always the same ones."""
    kind, sizes = DECODERS[name]
    try:
        config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **sizes, **overrides})
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class Calls:
    """What reached the attention function and the kernel."""

    def __init__(self) -> None:
        self.masks: list[Any] = []
        self.keywords: list[dict[str, Any]] = []
        self.key_lengths: list[int] = []
        self.causal: list[bool] = []
        self.biases: list[Any] = []

    def clear(self) -> None:
        for recorded in vars(self).values():
            recorded.clear()


class Batch(NamedTuple):
    """Token ids and the mask of what is no padding, both `[B, S]`."""

    ids: torch.Tensor
    mask: torch.Tensor


@pytest.fixture(autouse=True)
def _leaves_transformers_as_it_was() -> Iterator[None]:
    from subquad.hf import stand_ins

    before = (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))
    assert "subquad" not in before[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping) == before
    assert stand_ins._places == {}


@pytest.fixture
def decoder() -> Callable[..., Any]:
    return build


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records calls of the attention function and of the kernel, which still compute."""
    from subquad.hf import attention as module
    from subquad.hf import patching

    recorded = Calls()
    forward, kernel = module.attention_forward, module.attention

    def record_forward(
        module_: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        recorded.masks.append(attention_mask)
        recorded.keywords.append(kwargs)
        return forward(module_, query, key, value, attention_mask, **kwargs)

    def record_kernel(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        recorded.key_lengths.append(k.shape[1])
        recorded.causal.append(kwargs["causal"])
        recorded.biases.append(kwargs["bias"])
        return kernel(q, k, v, **kwargs)

    monkeypatch.setattr(patching, "attention_forward", record_forward)
    monkeypatch.setattr(module, "attention", record_kernel)
    return recorded


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(length: int = 20, *, left: int = 0, right: int = 0, size: int = 2) -> Batch:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, VOCABULARY, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :left] = 0
        if right:
            mask[-1, -right:] = 0
        return Batch(ids.masked_fill(mask == 0, 0), mask)

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compares float32 outputs at tokens, with a tolerance relative to the largest value."""

    def check(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        assert torch.isfinite(actual).all()
        if mask is not None:
            actual, expected = actual[mask.bool()], expected[mask.bool()]
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(actual / scale, expected / scale, atol=1e-5, rtol=0)

    return check


@pytest.fixture
def extend() -> Callable[..., torch.Tensor]:
    """Runs a model on the next tokens of a cache, `extend(model, cache, ids, mask)`; returns the logits."""

    def run(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        output: torch.Tensor = model(ids, attention_mask=mask, **{name: cache}).logits
        return output

    return run
