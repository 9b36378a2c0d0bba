"""Structured masks of whole models take memory in proportion to the sequence, not to its square."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface

import subquad.hf
from subquad.hf.structured_mask import StructuredMask


@pytest.fixture
def dense_masks(monkeypatch):
    """Counts the tensors that transformers' own mask functions build."""
    built = []
    for name in ("sdpa", "eager"):
        function = AttentionMaskInterface._global_mapping[name]

        def count(*args, function=function, **kwargs):
            mask = function(*args, **kwargs)
            built.append(0 if mask is None else mask.numel())
            return mask

        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, count)
    return built


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, (100, 0), (0, 100)])
def test_long_sequences_have_no_dense_mask(padding, original, *, decoder, make_batch, calls, dense_masks):
    length = 4096
    model = decoder("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=8)
    model.set_attn_implementation(original)
    left, right = padding or (0, 0)
    batch = make_batch(length, left=left, right=right, size=1)
    mask = None if padding is None else batch.mask
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        model.model(batch.ids, attention_mask=mask)
        report = handle.report()
    assert (report.computed, report.delegated, dict(report.dense)) == (1, (), {})
    assert dense_masks == []
    assert all(mask is None or isinstance(mask, StructuredMask) for mask in calls.masks)
    assert all(bias is None or bias.numel() == length for bias in calls.biases)
    assert calls.causal == [True]


def test_chunks_have_no_dense_mask(decoder, make_batch, extend, dense_masks):
    model = decoder("llama")
    batch = make_batch(20, left=3)
    with torch.no_grad(), subquad.hf.patch(model):
        cache = transformers.DynamicCache(config=model.config)
        for end in (5, 10, 15, 20):
            extend(model, cache, batch.ids[:, end - 5 : end], batch.mask[:, :end])
    assert dense_masks == []


def test_padding_rows_are_finite(decoder, make_batch):
    model = decoder("llama")
    batch = make_batch(20, left=6)
    with torch.no_grad(), subquad.hf.patch(model):
        assert torch.isfinite(model(batch.ids, attention_mask=batch.mask).logits).all()


_LONG = 2048
_SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}


def _small(kind, **sizes):
    common = {"vocab_size": 97, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.25}
    config = transformers.AutoConfig.for_model(kind, **{**common, **_SMALL, **sizes})
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval()


_LOCAL = {
    "gemma3": lambda: _small("gemma3_text", head_dim=8, sliding_window=64, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"]),
    "mistral": lambda: _small("mistral", sliding_window=64),
    "modernbert": lambda: _small("modernbert", local_attention=64, global_attn_every_n_layers=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, max_position_embeddings=_LONG),
    "llama4": lambda: _small("llama4_text", head_dim=8, attention_chunk_size=64, num_local_experts=1,
        interleave_moe_layer_step=3, intermediate_size_mlp=16, pad_token_id=0, max_position_embeddings=_LONG),
    "bert": lambda: _small("bert", pad_token_id=0, max_position_embeddings=_LONG),
}  # fmt: skip


@pytest.mark.parametrize("left", [None, 100])
@pytest.mark.parametrize("name", _LOCAL)
def test_local_masks_and_encoders_have_no_dense_mask(
    name, left, *, make_batch, calls, assert_same, dense_masks
):
    model = _LOCAL[name]()
    batch = make_batch(_LONG, left=left or 0)
    mask = None if left is None else batch.mask
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=mask).last_hidden_state
        dense_masks.clear()
        with subquad.hf.patch(model) as handle:
            actual = model(batch.ids, attention_mask=mask).last_hidden_state
            report = handle.report()
    assert_same(actual, expected, batch.mask)
    assert (report.computed, report.delegated, dict(report.dense)) == (2, (), {})
    assert dense_masks == []
    assert calls.biases == [None, None]


@pytest.mark.parametrize("name", ["gemma3", "mistral", "llama4"])
def test_packed_sequences_have_no_dense_mask(name, *, make_batch, calls, assert_same, dense_masks):
    model = _LOCAL[name]()
    ids = make_batch(_LONG, size=1).ids
    positions = torch.cat([torch.arange(700), torch.arange(_LONG - 700)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).last_hidden_state
        dense_masks.clear()
        with subquad.hf.patch(model) as handle:
            actual = model(ids, position_ids=positions, use_cache=False).last_hidden_state
            report = handle.report()
    assert_same(actual, expected)
    assert (report.computed, report.delegated, dict(report.dense)) == (2, (), {})
    assert dense_masks == []
    assert calls.biases == [None, None]
