"""Shapes of queries and keys, and masks of every kind, shape and dtype."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

import subquad.hf

from .layer_calls import call, reasons


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((1, 2, 3, 1025), (1, 2, 3, 1025)), "head_dim above 1024"),
        (((1, 4, 5, 8), (2, 4, 5, 8)), "shapes that broadcast"),
        (((2, 4, 0, 8), (2, 4, 5, 8)), "empty tensors"),
        (((2, 4, 5, 8), (2, 4, 3, 8)), "more causal queries than keys"),
        (((4, 5, 8), (4, 5, 8)), "tensors that are not 4-dimensional"),
    ],
)
def test_shapes(shapes, reason, decoder):
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    layer.num_key_value_groups = 1
    query, key = (torch.randn(shape) for shape in shapes)
    with torch.no_grad(), subquad.hf.patch(model) as handle, pytest.MonkeyPatch.context() as context:
        table = AttentionInterface._global_mapping
        context.setitem(table, "sdpa", lambda *_args, **_kwargs: "answer")
        assert table["subquad"](layer, query, key, key, None, scaling=1.0) == "answer"
        assert reasons(handle) == {(reason, "sdpa"): 1}


def test_masks_of_unknown_kinds(decoder):
    model = decoder("llama")
    with torch.no_grad(), subquad.hf.patch(model) as handle, pytest.MonkeyPatch.context() as context:
        context.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **_kwargs: args[4])
        masks = (object(), torch.ones(5, 5, dtype=torch.int64), torch.ones(5, 5, device="meta"))
        assert all(call(model, mask) is mask for mask in masks)
        assert [reason for reason, _ in reasons(handle)] == [
            "mask of type object",
            "mask of dtype int64",
            "mask on device meta",
        ]


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_no_mask_means_what_it_means_to_the_original(is_causal, original, decoder, assert_same):
    model = decoder("llama")
    model.set_attn_implementation(original)
    with torch.no_grad():
        expected = call(model, is_causal=is_causal)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, is_causal=is_causal)[0], expected)
            assert handle.report().computed == 1


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([True, False]).view(2, 1, 1, 1),
        torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)[:, None, None],
        torch.ones(5, 5, dtype=torch.bool).tril(),
        torch.ones(1, 5, 5, dtype=torch.bool).tril(),
        torch.ones(1, 4, 5, 5, dtype=torch.bool).tril(),
        torch.randn(1, 4, 5, 5),
        torch.randn(2, 1, 1, 5),
    ],
)
def test_masks_broadcast(mask, decoder, assert_same):
    model = decoder("llama")
    with torch.no_grad():
        expected = call(model, mask)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, mask)[0], expected)
            assert handle.report().computed == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float64, torch.float16])
def test_mask_dtypes(mask_dtype, dtype, decoder):
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    query = torch.randn(2, 4, 5, 8, dtype=dtype)
    mask = torch.randint(2, (2, 1, 5, 5)).to(mask_dtype)
    additive = mask.to(dtype) if mask_dtype != torch.bool else mask
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        table = AttentionInterface._global_mapping
        expected = table["sdpa"](layer, query, query[:, :2], query[:, :2], additive, scaling=0.3)[0]
        actual = table["subquad"](layer, query, query[:, :2], query[:, :2], mask, scaling=0.3)[0]
        assert handle.report().computed == 1
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    tokens = mask.any(-1)[:, 0] if mask_dtype == torch.bool else slice(None)
    torch.testing.assert_close(actual[tokens], expected[tokens], atol=tolerance, rtol=0)
