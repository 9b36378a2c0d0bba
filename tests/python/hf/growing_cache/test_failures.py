"""What fails changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from subquad.hf import growing_layers
from subquad.hf.growing_cache import GrowingCache

from .comparison import assert_same_cache, new_states


def _content(cache):
    """All that a cache holds, as copies."""

    def copied(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    return [
        {
            **{
                name: copied(value) for name, value in vars(layer).items() if name not in ("_keys", "_values")
            },
            "keys": copied(layer.keys),
            "values": copied(layer.values),
            "capacity": layer.capacity,
        }
        for layer in cache.layers
    ]


def _assert_same_content(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda x, y: x == y
            assert same(value, other[name]), name


def _mixed_cache(kind, decoder):
    config = decoder("gemma3", layer_types=["full_attention", "sliding_attention"]).config
    return kind(config=config)


def _fill(*caches, tokens=1):
    states = new_states(tokens)
    for cache in caches:
        for index in range(2):
            cache.update(*states, index)


FAILURES = {
    "batch of keys": lambda cache, index: cache.update(new_states(1, size=3)[0], new_states(1)[1], index),
    "batch of values": lambda cache, index: cache.update(new_states(1)[0], new_states(1, size=3)[1], index),
    "dimension of values": lambda cache, index: cache.update(*new_states(1)[:1] * 2, index),
    "axes of values": lambda cache, index: cache.update(new_states(1)[0], torch.zeros(1), index),
    "many values": lambda cache, index: cache.update(new_states(40)[0], new_states(40, size=3)[1], index),
    "no values": lambda cache, index: cache.update(new_states(1)[0], None, index),
    "no keys": lambda cache, index: cache.update(None, new_states(1)[1], index),
    "no such layer": lambda cache, index: cache.update(*new_states(1), 2 + index),
    "crop of a window": lambda cache, index: cache.crop(-3),
    "crop to a length": lambda cache, index: cache.crop(3),
    "no such beam": lambda cache, index: cache.reorder_cache(torch.tensor([0, 7])),
    "beams of another type": lambda cache, index: cache.reorder_cache(torch.tensor([0.5, 1.0])),
    "no such row": lambda cache, index: cache.batch_select_indices(torch.tensor([0, 7])),
    "negative repeats": lambda cache, index: cache.batch_repeat_interleave(-1),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_errors_change_nothing(context, index, failure, decoder):
    actual, expected = (_mixed_cache(kind, decoder) for kind in (GrowingCache, DynamicCache))
    with context():
        for tokens in (20, 1, 1):
            _fill(actual, expected, tokens=tokens)
        before = _content(actual)
        with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError, TypeError)):
            FAILURES[failure](actual, index)
        _assert_same_content(_content(actual), before)
        for _ in range(20):
            _fill(actual, expected)
    assert_same_cache(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("configured", [True, False])
def test_errors_leave_an_empty_cache_empty(configured, decoder):
    cache = _mixed_cache(GrowingCache, decoder) if configured else GrowingCache()
    before = _content(cache)
    for index in (0, 1):
        with pytest.raises((AttributeError, TypeError)):
            cache.update(new_states(1)[0], None, index)
    _assert_same_content(_content(cache), before)
    assert len(cache) == (2 if configured else 0)
    expected = _mixed_cache(DynamicCache, decoder) if configured else DynamicCache()
    _fill(cache, expected)
    assert_same_cache(cache, expected)


@torch.no_grad()
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_failures_on_the_way(calls, error, decoder, monkeypatch):
    """The keys are stored already, or both."""
    actual, expected = (_mixed_cache(kind, decoder) for kind in (GrowingCache, DynamicCache))
    for tokens in (20, 1):
        _fill(actual, expected, tokens=tokens)
    before = _content(actual)
    original = growing_layers._Span.append
    left = [calls]

    def fail(span, *args, **kwargs):
        result = original(span, *args, **kwargs)
        left[0] -= 1
        if not left[0]:
            raise error
        return result

    monkeypatch.setattr(growing_layers._Span, "append", fail)
    states = new_states(1)
    done = 0
    with pytest.raises(error):  # noqa: PT012
        for index in (0, 1):
            actual.update(*states, index)
            before, done = _content(actual), done + 1
    _assert_same_content(_content(actual), before)
    monkeypatch.undo()
    for index in (0, 1):
        expected.update(*states, index)
        if index >= done:
            actual.update(*states, index)
    for _ in range(20):
        _fill(actual, expected)
    assert_same_cache(actual, expected)
