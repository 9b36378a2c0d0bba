"""Latents and rotary keys of one layer lie side by side in a growing cache, and are what `DynamicCache` holds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from subquad.hf.growing_layers import GrowingLayer, GrowingSlidingWindowLayer

RANK, ROT = 12, 4


def _states(added, *, size=2, heads=1, widths=(RANK, ROT), dtypes=(torch.float32, torch.float32)):
    return tuple(
        torch.randn(size, heads, added, one, dtype=dtype) for one, dtype in zip(widths, dtypes, strict=True)
    )


def _lie_together(layer):
    keys, values = layer.keys, layer.values
    return (
        keys.stride() == values.stride()
        and keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        and values.data_ptr() == keys.data_ptr() + keys.shape[3] * keys.element_size()
    )


@torch.no_grad()
@pytest.mark.parametrize("layer", [GrowingLayer(), GrowingSlidingWindowLayer(64)], ids=["full", "window"])
def test_rows(layer):
    addresses = set()
    for added in (9, *[1] * 150):
        layer.update(*_states(added))
        assert _lie_together(layer)
        assert layer.keys.stride(2) == RANK + ROT
        addresses.add(layer.keys.untyped_storage().data_ptr())
    assert len(addresses) < 20


@torch.no_grad()
@pytest.mark.parametrize(
    "states",
    [
        {"heads": 2},
        {"widths": (8, 8)},
        {"dtypes": (torch.float32, torch.bfloat16)},
    ],
    ids=["heads", "widths", "dtypes"],
)
def test_other_states_lie_apart(states):
    layer = GrowingLayer()
    for added in (5, 1):
        appended = _states(added, **states)
        layer.update(*appended)
        assert layer.keys.stride(2) == layer.keys.shape[3]
        assert layer.keys.untyped_storage().data_ptr() != layer.values.untyped_storage().data_ptr()
        assert (layer.keys.dtype, layer.values.dtype) == tuple(one.dtype for one in appended)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(1),
        lambda layer: layer.reset(),
        lambda layer: setattr(layer, "keys", layer.keys.clone()),
        lambda layer: setattr(layer, "values", layer.values.clone()),
    ],
    ids=["crop", "reorder", "select", "repeat", "reset", "keys", "values"],
)
def test_rows_after_changes(change):
    layers = GrowingLayer(), DynamicLayer()
    states = _states(9), _states(1)
    for layer in layers:
        layer.update(*states[0])
        change(layer)
        layer.update(*states[1])
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert torch.equal(layers[0].values, layers[1].values)
    assert _lie_together(layers[0])


@torch.no_grad()
def test_reordered_rows_lie_together():
    layer = GrowingLayer()
    layer.update(*_states(9))
    before = layer.keys.clone(), layer.values.clone()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert _lie_together(layer)
    assert torch.equal(layer.keys, before[0][[1, 1]])
    assert torch.equal(layer.values, before[1][[1, 1]])


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_hold_the_used_part(copied):
    layer = GrowingLayer()
    layer.update(*_states(9))
    duplicate = copied(layer)
    assert duplicate.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert torch.equal(duplicate.values, layer.values)
    duplicate.update(*_states(1))
    assert _lie_together(duplicate)
    assert layer.get_seq_length() == 9


@torch.no_grad()
def test_an_error_leaves_both_parts(monkeypatch):
    layer = GrowingLayer()
    layer.update(*_states(9))
    before = layer.keys.clone(), layer.values.clone()
    keys, _ = _states(40)
    _, values = _states(40, size=3)
    with pytest.raises(RuntimeError):
        layer.update(keys, values)
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])
    assert _lie_together(layer)
