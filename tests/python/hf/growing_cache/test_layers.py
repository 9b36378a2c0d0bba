"""Layers of `GrowingCache` hold what those of `DynamicCache` hold, whatever is done to them."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import transformers
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from subquad.hf.growing_cache import GrowingCache
from subquad.hf.growing_layers import GrowingLayer, GrowingSlidingWindowLayer, growing

from .comparison import WINDOW, assert_same_cache, assert_same_layer, both_layers, new_states


def _draw_operation(draw, kind, *, size, heads):
    """Returns the name and the arguments of a method of a layer, and the batch size after it."""
    name = draw.choice(
        ["update"] * 16
        + ["crop"] * 4
        + ["reorder_cache"] * 2
        + ["record", "reset", "batch_repeat_interleave", "batch_select_indices"]
    )
    if name == "batch_repeat_interleave" and size > 2:
        name = "batch_select_indices"
    if name == "record" and kind is DynamicLayer:
        name = "reset"
    arguments = {
        "update": lambda: new_states(draw.choice([1, 1, 1, 2, 5, WINDOW, 30]), size=size, heads=heads),
        "crop": lambda: (-draw.choice([0, 1, 1, 2, 5, 40 if kind is DynamicLayer else 3]),),
        "reorder_cache": lambda: (torch.tensor([draw.randrange(size) for _ in range(size)]),),
        "record": lambda: (draw.random() < 0.5,),
        "reset": lambda: (),
        "batch_repeat_interleave": lambda: (2,),
        "batch_select_indices": lambda: (torch.tensor([size - 1, 0]),),
    }[name]()
    return name, arguments, {"batch_repeat_interleave": size * 2, "batch_select_indices": 2}.get(name, size)


def _apply(layer, name, arguments):
    if name == "record":
        layer.record_past = arguments[0]
        return None
    try:
        return getattr(layer, name)(*arguments)
    except RuntimeError as error:
        assert name == "crop"
        return str(error)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_random_operations(kind, seed, heads, context):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    actual, expected = both_layers(kind)
    size = 2
    with context():
        for _ in range(150):
            name, arguments, size_after = _draw_operation(draw, kind, size=size, heads=heads)
            if expected.get_seq_length() == 0 and name != "update":
                # Empty layers keep their batch size, and those without any tensor cannot be cropped.
                continue
            size = size_after
            results = [_apply(layer, name, arguments) for layer in (actual, expected)]
            if name == "update":
                assert all(map(torch.equal, *results))
            else:
                assert results[0] == results[1]
            assert_same_layer(actual, expected)
            if draw.random() < 0.05:
                actual = copy.deepcopy(actual)


@torch.no_grad()
def test_assigned_tensors_are_not_written():
    layer = GrowingLayer()
    layer.update(*new_states(4))
    mine = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 6)
    layer.keys, layer.values = (tensor[:, :, :5] for tensor in mine)
    before = [tensor.clone() for tensor in mine]
    k, _ = layer.update(*new_states(1))
    assert k.shape[2] == 6
    assert all(map(torch.equal, mine, before))
    # Nor does a layer write into the buffer of another one.
    other = GrowingLayer()
    other.update(*new_states(1))
    other.keys, other.values = layer.keys, layer.values
    appended, appended_other = new_states(1), new_states(1)
    k_other = torch.cat([layer.keys, appended_other[0]], dim=2)
    layer.update(*appended)
    other.update(*appended_other)
    assert torch.equal(layer.keys[:, :, -1:], appended[0])
    assert torch.equal(other.keys, k_other)


@torch.no_grad()
@pytest.mark.parametrize(
    "part",
    [
        lambda states: states[:, :, ::2],
        lambda states: states[:, :, 3:],
        lambda states: states[1:],
        lambda states: states[:, :2],
        lambda states: states[:, :, :0],
    ],
    ids=["every other", "last", "row", "heads", "none"],
)
def test_assigned_parts(part):
    layers = GrowingLayer(), DynamicLayer()
    states = new_states(9)
    for layer in layers:
        layer.update(*states)
        layer.keys, layer.values = part(layer.keys), part(layer.values)
    added = [torch.randn(*tensor.shape[:2], 4, tensor.shape[3]) for tensor in map(part, states)]
    assert all(map(torch.equal, *(layer.update(*added) for layer in layers)))
    assert_same_layer(*layers)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies(copied, decoder):
    config = decoder("gemma3").config
    caches = GrowingCache(config=config), DynamicCache(config=config)
    for _ in range(20):
        states = new_states(1)
        for cache in caches:
            cache.update(*states, 0)
            cache.update(*states, 1)
    duplicate = copied(caches[0])
    for layer, original in zip(duplicate.layers, caches[0].layers, strict=True):
        assert type(layer) is type(original)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    caches[0].update(*new_states(1), 0)
    assert duplicate.get_seq_length() == 20
    states = new_states(1)
    for cache in (duplicate, caches[1]):
        cache.update(*states, 0)
        cache.update(*states, 1)
    assert_same_cache(duplicate, caches[1])


def test_shallow_copy_of_a_layer():
    with torch.no_grad():
        layer = GrowingLayer()
        layer.update(*new_states(3))
        duplicate = copy.copy(layer)
        states = new_states(1)
        layer.update(*states)
        duplicate.update(*new_states(1))
    assert torch.equal(layer.keys[:, :, -1:], states[0])


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_gradients(kind):
    results = []
    for layer in both_layers(kind):
        torch.manual_seed(0)
        with torch.no_grad():
            layer.update(*new_states(5))
        inputs = [[tensor.requires_grad_() for tensor in new_states(1)] for _ in range(4)]
        loss = torch.zeros(())
        for k, v in inputs:
            k_all, v_all = layer.update(k, v)
            loss = loss + (k_all.sin().sum() * v_all.cos().sum())
        results.append(torch.autograd.grad(loss, [one for pair in inputs for one in pair]))
        with torch.no_grad():
            layer.update(*new_states(1))
            assert not layer.update(*new_states(1))[0].requires_grad
    assert all(map(torch.equal, *results))


def test_saved_for_backward():
    """The query needs a gradient, the keys, of frozen weights, do not."""
    layer = GrowingLayer()
    query = torch.randn(2, 3, 1, 4, requires_grad=True)
    k, _ = layer.update(*new_states(3))
    scores = query @ k.mT
    with torch.no_grad():
        layer.update(*new_states(1))
        layer.update(*new_states(1))
    scores.sum().backward()
    assert torch.equal(query.grad, k.sum(2, keepdim=True))


def test_leaving_inference_mode():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*new_states(3))
        layer.update(*new_states(1))
    with torch.no_grad():
        assert layer.update(*new_states(1))[0].shape[2] == 5
        assert layer.update(*new_states(1))[0].shape[2] == 6


def test_fake_tensors():
    with torch.no_grad(), torch._subclasses.FakeTensorMode():
        layer = GrowingLayer()
        layer.update(*new_states(3))
        layer.crop(-1)
        assert layer.update(*new_states(1))[0].shape == (2, 3, 3, 4)
        assert layer.capacity == 0


@torch.no_grad()
def test_compiled():
    layers = GrowingLayer(), DynamicLayer()
    update = torch.compile(layers[0].update, backend="eager", fullgraph=True)
    layers[0].update(*new_states(2))
    layers[1].update(layers[0].keys, layers[0].values)
    states = new_states(1)
    assert all(map(torch.equal, update(*states), layers[1].update(*states)))
    assert layers[0].capacity == 0
    layers[0].update(*new_states(1))
    assert layers[0].capacity == 20


@torch.no_grad()
def test_mismatch():
    """What `torch.cat` promotes or refuses."""
    for layer in both_layers(DynamicLayer):
        layer.update(*new_states(2))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*new_states(1, size=3))
        assert layer.get_seq_length() == 2
        assert layer.update(*new_states(1, dtype=torch.float64))[0].dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
def test_narrow_windows(window):
    layers = GrowingSlidingWindowLayer(window), DynamicSlidingWindowLayer(window)
    for _ in range(40):
        states = new_states(1)
        results = [layer.update(*states)[0] for layer in layers]
        assert torch.equal(*results)
        assert_same_layer(*layers)


@torch.no_grad()
def test_content_from_another_cache():
    source = DynamicCache()
    source.update(*new_states(4), 0)
    for cache in (GrowingCache(list(source)), GrowingCache.adopt(source)):
        states = new_states(1)
        k, _ = cache.update(*states, 0)
        assert torch.equal(k, torch.cat([source.layers[0].keys, states[0]], dim=2))
        assert type(cache.layers[0]) is GrowingLayer
    cache.update(*new_states(1), 2)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
    with pytest.raises(TypeError, match=r"expected a transformers\.DynamicCache, got GrowingCache"):
        GrowingCache.adopt(cache)


def test_layers_of_other_kinds_stay():
    layer = LinearAttentionLayer()
    assert growing(layer) is layer
    with pytest.raises(ValueError, match="offloading"):
        GrowingCache(offloading=True)
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    cache = GrowingCache(config=config)
    assert {type(layer) for layer in cache.layers} == {LinearAttentionLayer, GrowingLayer}
    assert not GrowingCache(config=transformers.MambaConfig(num_hidden_layers=2)).is_compileable
