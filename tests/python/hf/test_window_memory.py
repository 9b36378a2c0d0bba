"""Layers with a window hold that much of a prompt, not a view of all of it."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

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
