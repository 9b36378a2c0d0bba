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
