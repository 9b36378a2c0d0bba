"""Layers with a window hold that much of a prompt, not a view of all of it."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from subquad.hf import GrowingCache
from subquad.hf.growing_layers import GrowingSlidingWindowLayer


def _states(added):
    # As of a projection: the axes of heads and tokens are transposed.
    return tuple(torch.randn(2, added, 3, dim).transpose(1, 2) for dim in (4, 6))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(3000,), (500, 2500), (30, 2970), (2999, 1)])
@pytest.mark.parametrize("window", [64, 4096])
def test_size(pieces, window):
    actual, expected = GrowingSlidingWindowLayer(window), DynamicSlidingWindowLayer(window)
    for added in pieces:
        states = _states(added)
        assert all(map(torch.equal, actual.update(*states), expected.update(*states)))
        assert all(map(torch.equal, (actual.keys, actual.values), (expected.keys, expected.values)))
    tokens = actual.keys.untyped_storage().nbytes() // actual.keys[:, :, :1].nbytes
    assert tokens <= min(window, sum(pieces)) + window // 4


@torch.no_grad()
def test_copy():
    layer = GrowingSlidingWindowLayer(64)
    states = _states(3000)
    returned = layer.update(*states)
    expected = [one[:, :, -63:].clone() for one in states]
    for one in returned:
        one.zero_()
    assert all(map(torch.equal, (layer.keys, layer.values), expected))


def _caches():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=6, layer_types=kinds, sliding_window=64)
    return GrowingCache(config=config), DynamicCache(config=config)


def _addresses(layers):
    return {one.untyped_storage().data_ptr() for layer in layers for one in (layer.keys, layer.values)}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_layers_share_an_allocation(guard):
    actual, expected = _caches()
    with guard():
        for added in (300, 1, 200, 200, 1):
            for layer in range(6):
                states = _states(added)
                pairs = zip(actual.update(*states, layer), expected.update(*states, layer), strict=True)
                assert all(torch.equal(one, other) for one, other in pairs)
            if added == 300:
                # One of keys, one of values.
                assert len(_addresses(actual.layers[:5])) == 2
            for one, other in zip(actual.layers, expected.layers, strict=True):
                assert torch.equal(one.keys, other.keys)
                assert torch.equal(one.values, other.values)


@torch.no_grad()
def test_layers_of_other_shapes_have_memory_of_their_own():
    cache, _ = _caches()
    cache.update(*_states(300), 0)
    wide = torch.randn(2, 3, 300, 8)
    cache.update(wide, wide, 1)
    assert torch.equal(cache.layers[1].keys, wide[:, :, -63:])
    assert _addresses(cache.layers[:1]).isdisjoint(_addresses(cache.layers[1:2]))
