"""Methods that are replaced on the modules of a patched model."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from transformers.models.minimax import modeling_minimax

import subquad.hf
from subquad.hf.recurrent import recurrent_modules

from .models import build, distance, whole

OPERATOR, METHOD = "chunk_simple_gla", "MiniMaxLightningAttention.forward"


@pytest.fixture
def model():
    return build("minimax")


def _layer(model):
    (layer,) = recurrent_modules(model)
    return layer


def _states(model, tokens=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, model.config.hidden_size, generator=generator)


def test_undo(model):
    layer = _layer(model)
    before = dict(vars(layer))
    first, second = subquad.hf.patch(model), subquad.hf.patch(model)
    with torch.no_grad():
        whole(model)
        first.undo()
        whole(model)
    assert (first.report().computed_recurrent, second.report().computed_recurrent) == (
        {OPERATOR: 1},
        {OPERATOR: 2},
    )
    second.undo()
    assert vars(layer) == before


def test_another_model_of_the_class(model):
    other = build("minimax")
    with torch.no_grad():
        expected = whole(other)
        with subquad.hf.patch(model) as handle:
            assert torch.equal(whole(other), expected)
            assert handle.report().computed_recurrent == {}


def test_copy_and_pickle_of_a_patched_layer(model):
    with torch.no_grad():
        layer, states = _layer(model), _states(model)
        expected = layer(states, None, None)[0]
        with subquad.hf.patch(model):
            copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
            assert all(distance(one(states, None, None)[0], expected) < 1e-5 for one in copies)
        assert all(distance(one(states, None, None)[0], expected) < 1e-5 for one in copies)


def test_compile(model):
    layer, states = _layer(model), _states(model)
    with torch.no_grad():
        expected = layer(states, None, None)[0]
        with subquad.hf.patch(model) as handle:
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            assert distance(compiled(states, None, None)[0], expected) < 1e-5
            assert handle.report().compiled
            assert handle.report().computed_recurrent == {}
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [lambda output: 1.1 * output, lambda output: output[:, :-1], None])
def test_another_computation_is_left_alone(change, model):
    class MiniMaxLightningAttention(modeling_minimax.MiniMaxLightningAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
            if change is None:
                raise NotImplementedError
            output, state = super().forward(
                hidden_states, position_embeddings, attention_mask, cache, **kwargs
            )
            return change(output), state

    layer = _layer(model)
    layer.__class__ = MiniMaxLightningAttention
    assert recurrent_modules(model) == []
    with subquad.hf.patch(model) as handle:
        assert "forward" not in vars(layer)
        report = handle.report()
    assert report.recurrent == ()
    assert "MiniMaxLightningAttention" in [one.name for one in report.left_alone]


def test_mask_of_other_tokens(model):
    layer, states = _layer(model), _states(model, 1)
    with torch.no_grad():
        expected = layer(states, None, None)[0]
        with subquad.hf.patch(model) as handle:
            mask = torch.ones(2, 4, dtype=torch.bool)
            assert distance(layer(states, None, mask)[0], expected) < 1e-5
            mask[0, 0] = False
            with pytest.raises(RuntimeError):
                layer(states, None, mask)
            assert [(one.reason, one.original) for one in handle.report().delegated] == [
                ("a mask of other tokens", METHOD)
            ]


def test_forward_set_by_others(model):
    layer = _layer(model)
    layer.forward = own = functools.partial(layer.forward)
    with subquad.hf.patch(model) as handle:
        assert layer.forward is own
        report = handle.report()
    assert report.recurrent == ()
    assert ("MiniMaxLightningAttention", "something else has shadowed its method") in [
        (one.name, one.reason) for one in report.left_alone
    ]
