"""`use_in_generate`: where `generate` takes a `GrowingCache`, and how that is undone."""

from __future__ import annotations

import copy
import inspect
import pickle

import transformers
from transformers.cache_utils import DynamicCache

from subquad.hf.growing_cache import GrowingCache, use_in_generate

from .comparison import generate

SEAM = "_prepare_cache_for_generation"


def test_undo(decoder, make_batch):
    model = decoder("llama")
    batch = make_batch(5)
    attributes = dict(vars(model))
    first, second, third = (use_in_generate(model) for _ in range(3))
    duplicate = copy.deepcopy(model)
    assert type(generate(duplicate, batch)[1]) is GrowingCache
    assert vars(duplicate)[SEAM].__self__ is duplicate
    assert type(generate(pickle.loads(pickle.dumps(model)), batch)[1]) is DynamicCache
    first.undo()
    first.undo()
    assert not first.active
    assert second.active
    second.undo()
    assert type(generate(model, batch)[1]) is GrowingCache
    third.undo()
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[name] is value for name, value in attributes.items())
    assert type(generate(model, batch)[1]) is DynamicCache
    with use_in_generate(duplicate):
        pass
    assert SEAM not in vars(duplicate)


def test_other_caches_stay(decoder, make_batch):
    model = decoder("llama")
    batch = make_batch(5)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    mine = DynamicCache(config=model.config)
    with use_in_generate(model):
        assert generate(model, batch, **{name: mine})[1] is mine
        static = generate(model, batch, cache_implementation="static")[1]
        assert isinstance(static, transformers.StaticCache)
        assert model.generate(batch.ids, use_cache=False, max_new_tokens=2).shape == (2, 7)


def test_left_alone(decoder):
    model = decoder("gemma4")
    for one, reason in ((model, "num_kv_shared_layers"), (decoder("llama").model, "no generate")):
        before = dict(vars(one))
        handle = use_in_generate(one)
        assert reason in handle.reason
        assert not handle.active
        assert vars(one) == before
        handle.undo()
    model = decoder("llama")
    theirs = model._prepare_cache_for_generation
    setattr(model, SEAM, theirs)
    handle = use_in_generate(model)
    assert "something else" in handle.reason
    handle.undo()
    assert vars(model)[SEAM] is theirs
