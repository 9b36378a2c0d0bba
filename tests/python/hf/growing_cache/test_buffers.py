"""How large the buffers of layers are, and how often they are copied."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from subquad.hf import growing_layers
from subquad.hf.growing_cache import GrowingCache
from subquad.hf.growing_layers import GrowingLayer

from .comparison import WINDOW, both_layers, new_states


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_appends_in_place(kind):
    layer, _ = both_layers(kind)
    addresses, tokens = [], []
    for _ in range(1000):
        states = new_states(1)
        k, v = layer.update(*states)
        tokens.append(k)
        assert k.stride() == (3 * layer.capacity * 4, layer.capacity * 4, 4, 1)
        assert v.stride() == (3 * layer.capacity * 6, layer.capacity * 6, 6, 1)
        assert layer.capacity <= max(2 * k.shape[2], k.shape[2] + 16)
        address = layer.keys.untyped_storage().data_ptr()
        if not addresses or addresses[-1] != address:
            addresses.append(address)
    # 17, 36, 74, 150, 302, 606 and 1214 tokens; a window moves on by 8 or more.
    assert len(addresses) <= (7 if kind is DynamicLayer else 1000 / 8 + 1)
    # Views from before show what they did, also across new buffers.
    for older, newer in itertools.pairwise(tokens):
        common = min(older.shape[2], newer.shape[2] - 1)
        assert torch.equal(older[:, :, older.shape[2] - common :], newer[:, :, -1 - common : -1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, 17), (100, 116), (128, 144), (4096, 4608), (8192, 9216), (20_000, 21_024)]
)
def test_first_buffer(tokens, capacity):
    """Right after a prompt, little more is held than the prompt."""
    layer = GrowingLayer()
    layer.update(*new_states(tokens, size=1))
    assert layer.capacity == capacity
    for _ in range(capacity - tokens):
        layer.update(*new_states(1, size=1))
    assert layer.capacity == capacity
    layer.update(*new_states(1, size=1))
    assert layer.capacity == 2 * (capacity + 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("added", "copies"), [(1, 2), (5, 2), (64, 9), (500, 9)], ids=["1", "5", "64", "500"]
)
def test_copies_per_token(added, copies):
    layer = GrowingLayer()
    layer.update(*(torch.zeros(1, 1, 4096, 4) for _ in range(2)))
    copied, length = 0, 4096
    while length < 100_000:
        address = layer.keys.data_ptr()
        layer.update(*(torch.zeros(1, 1, added, 4) for _ in range(2)))
        if layer.keys.data_ptr() != address:
            copied += length
        length += added
    assert layer.get_seq_length() == length
    assert 0 < copied <= copies * length


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_appending_does_not_concatenate(kind, monkeypatch):
    layers = both_layers(kind)
    prompt = new_states(50)
    states = [new_states(added) for added in (1, 1, 4, 1, 2) * 30]
    expected = [layers[1].update(*pair) for pair in (prompt, *states)]
    actual = [layers[0].update(*prompt)]

    def fail(*args, **kwargs):
        raise AssertionError("it concatenates")

    monkeypatch.setattr(torch, "cat", fail)
    actual += [layers[0].update(*pair) for pair in states]
    monkeypatch.undo()
    for one, other in zip(actual, expected, strict=True):
        assert all(map(torch.equal, one, other))
    if kind is DynamicSlidingWindowLayer:
        assert layers[0].capacity <= WINDOW - 1 + 4 + 16


@torch.no_grad()
def test_large_buffers_grow_less(monkeypatch):
    layers = GrowingLayer(), GrowingLayer()
    for layer in layers:
        layer.update(*new_states(100))
    layers[0].update(*new_states(20))
    monkeypatch.setattr(growing_layers, "_DOUBLING_BYTES", 2 * 3 * 4 * 4 * 119)
    layers[1].update(*new_states(20))
    assert [layer.capacity for layer in layers] == [240, 180]


@torch.no_grad()
@pytest.mark.parametrize("configured", [False, True])
def test_reserve(configured, decoder):
    cache = GrowingCache(config=decoder("gemma3").config if configured else None)
    cache.reserve(500)
    cache.update(*new_states(3), 1)
    address = cache.layers[1].keys.data_ptr()
    for _ in range(497):
        cache.update(*new_states(1), 1)
    assert cache.layers[1].capacity == 500
    assert cache.layers[1].keys.data_ptr() == address


@torch.no_grad()
def test_crop_keeps_the_buffer():
    layer = GrowingLayer()
    layer.update(*new_states(20))
    address = layer.keys.data_ptr()
    layer.crop(-5)
    states = new_states(7)
    k, _ = layer.update(*states)
    assert k.data_ptr() == address
    assert torch.equal(k[:, :, 15:], states[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_select_indices", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 1),
    ],
)
def test_changes_of_rows_free_layer_by_layer(name, argument):
    cache = GrowingCache()
    for index in range(3):
        cache.update(*new_states(4), index)
    first = weakref.ref(cache.layers[0]._keys.buffer)
    freed = []

    class Watching(GrowingLayer):
        def get_seq_length(self):
            freed.append(first() is None)
            return super().get_seq_length()

    cache.layers[2] = Watching()
    cache.update(*new_states(4), 2)
    freed.clear()
    getattr(cache, name)(argument)
    assert freed[0]
