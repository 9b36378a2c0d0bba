"""`GrowingCache` and its layers beside those of transformers: what both are given, and that both hold the same."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from subquad.hf.growing_cache import GrowingCache
from subquad.hf.growing_layers import GrowingLayer, GrowingSlidingWindowLayer

NEW_TOKENS = 24
WINDOW = 8


def generate(model, batch, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **options}
    result = model.generate(
        batch.ids, attention_mask=batch.mask, return_dict_in_generate=True, disable_compile=True, **options
    )
    return result, getattr(result, "cache", None) or result.past_key_values


def assert_same_cache(actual, expected):
    assert type(actual) is GrowingCache
    assert type(expected) is DynamicCache
    assert len(actual) == len(expected)
    assert actual.get_seq_length() == expected.get_seq_length()
    for (k, v, *_), (k_expected, v_expected, *_) in zip(actual, expected, strict=True):
        torch.testing.assert_close(k, k_expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v, v_expected, atol=1e-4, rtol=1e-4)


def new_states(added, *, size=2, heads=3, dtype=torch.float32):
    # As of a projection: the axes of heads and tokens are transposed.
    k, v = (torch.randn(size, added, heads, dim, dtype=dtype).transpose(1, 2) for dim in (4, 6))
    return k, v


def both_layers(kind):
    if kind is DynamicLayer:
        return GrowingLayer(), DynamicLayer()
    return GrowingSlidingWindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)


def assert_same_layer(actual, expected):
    assert actual.get_seq_length() == expected.get_seq_length()
    assert actual.get_mask_sizes(3) == expected.get_mask_sizes(3)
    for name in ("keys", "values"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
