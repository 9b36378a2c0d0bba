"""Layers of delta rules that are computed as a whole, and when they are not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.qwen3_5 import modeling_qwen3_5

import subquad.hf
from subquad.hf import whole_layers
from subquad.hf.recurrent import recurrent_modules

from .models import LENGTH, RUNS, build, distance, in_parts, tokens, whole

NORM = "rms_norm_gated"
KINDS = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "lara_mini", "olmo_hybrid"),
    *("kimi_linear", "bailing_hybrid"),
)


def _layers(model):
    return recurrent_modules(model)


@pytest.fixture
def model():
    return build("qwen3_5_text")


@pytest.mark.parametrize("kind", KINDS)
def test_known_layers(kind):
    model = build(kind)
    random = torch.get_rng_state()
    with subquad.hf.patch(model) as handle:
        assert torch.equal(torch.get_rng_state(), random)
        (layers,) = handle.report().recurrent
        assert layers.whole
        assert layers.obstacle is None
        assert NORM in layers.operators
        assert handle.report().computed_recurrent == {}
        with torch.no_grad():
            in_parts(model, (LENGTH - 1, LENGTH))
        assert handle.report().computed_recurrent[NORM] == 2 * layers.count
        assert handle.report().in_parts == {}


@pytest.mark.parametrize("kind", ["mamba2", "lfm2", "minimax"])
def test_layers_that_are_not_known(kind):
    with subquad.hf.patch(build(kind)) as handle:
        (layers,) = handle.report().recurrent
    assert not layers.whole
    assert layers.obstacle is None


@pytest.mark.parametrize("heads", [2, 6])
def test_groups_of_value_heads(heads):
    from ..sizes import tiny_config

    config = tiny_config("qwen3_next")
    config.linear_num_key_heads, config.linear_num_value_heads = 2, heads
    config.linear_key_head_dim, config.linear_value_head_dim = 12, 20
    torch.manual_seed(0)
    from transformers import Qwen3NextForCausalLM

    model = Qwen3NextForCausalLM(config).eval().float()
    with torch.no_grad():
        expected = {run: compute(model) for run, compute in RUNS.items()}
        with subquad.hf.patch(model) as handle:
            worst = {run: distance(compute(model), expected[run]) for run, compute in RUNS.items()}
            assert handle.report().recurrent[0].whole
    assert max(worst.values()) < 2e-5, worst


def test_states_stay_where_they_are(model):
    ids, _ = tokens()
    with torch.no_grad(), subquad.hf.patch(model):
        cache = model(ids[:, :20], use_cache=True).cache
        layer = next(one for one in cache.layers if hasattr(one, "recurrent_states"))
        before = layer.conv_states[0], layer.recurrent_states[0]
        model(ids[:, 20:24], use_cache=True, cache=cache)
        model(ids[:, 24:25], use_cache=True, cache=cache)
        assert layer.conv_states[0] is before[0]
        assert layer.recurrent_states[0] is before[1]


def test_pieces_shorter_than_a_filter(model):
    ends = (1, 2, 4, 5, 7, 12)
    with torch.no_grad():
        ids, _ = tokens()
        expected = model(ids[:, : ends[-1]], use_cache=False).logits

        def run():
            cache, logits = None, []
            for start, end in zip((0, *ends), ends, strict=False):
                output = model(ids[:, start:end], use_cache=True, cache=cache)
                cache, logits = output.cache, [*logits, output.logits]
            return torch.cat(logits, 1)

        with subquad.hf.patch(model) as handle:
            assert distance(run(), expected) < 2e-5
            assert handle.report().in_parts == {}


def test_states_are_those_of_transformers(model):
    ids, mask = tokens(9)

    def states():
        cache = None
        for start, end in ((0, 30), (30, 33), (33, 34)):
            cache = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, cache=cache).cache
        layer = next(one for one in cache.layers if hasattr(one, "recurrent_states"))
        return layer.conv_states[0], layer.recurrent_states[0]

    with torch.no_grad():
        expected = states()
        with subquad.hf.patch(model):
            actual = states()
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 2e-5


@pytest.mark.parametrize("kind", ["qwen3_next", "kimi_linear"])
def test_long_prompts_in_pieces(kind, monkeypatch):
    monkeypatch.setattr(whole_layers, "_ROWS", 130)
    assert whole_layers._pieces(2, 127, 4) == [(0, 127)]
    assert whole_layers._pieces(2, 128, 4) == [(0, 64), (64, 128)]
    assert whole_layers._pieces(2, 200, 4) == [(0, 64), (64, 128), (128, 200)]
    assert whole_layers._pieces(200, 200, 4) == whole_layers._pieces(2, 200, 65) == [(0, 200)]
    model = build(kind)
    ids = torch.randint(5, 50, (2, 201), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0

    def run():
        alone = model(ids[:, :150], use_cache=False).logits
        first = model(ids[:, :200], attention_mask=mask[:, :200], use_cache=True)
        second = model(ids[:, 200:], attention_mask=mask, use_cache=True, cache=first.cache)
        padded = torch.cat([first.logits, second.logits], 1)[mask.bool()]
        layer = next(one for one in first.cache.layers if hasattr(one, "recurrent_states"))
        return alone, padded, layer.conv_states[0], layer.recurrent_states[0]

    with torch.no_grad():
        expected = run()
        with subquad.hf.patch(model) as handle:
            actual = run()
            assert handle.report().in_parts == {}
    for one, other in zip(actual, expected, strict=True):
        assert distance(one, other) < 2e-5


def test_calls_in_parts(model):
    # For each reason, what the logits are and why the layer is computed function by function.
    def with_gradients():
        with torch.enable_grad():
            return whole(model).detach()

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return whole(model)

    def recording():
        ids, _ = tokens()
        cache = model(ids[:, :1], use_cache=True).cache
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        return model(ids[:, 1:30], use_cache=True, cache=cache).logits

    def hooked():
        norm = _layers(model)[0].norm
        hook = norm.register_forward_hook(lambda _module, _inputs, output: output / 2)
        try:
            return whole(model)
        finally:
            hook.remove()

    reasons = {
        "gradients": (with_gradients, 2e-5),
        "autocast": (under_autocast, 0.05),
        "a cache that records the past": (recording, 2e-5),
        "hooks on parts of the layer": (hooked, 2e-5),
    }
    count = len(_layers(model))
    with torch.no_grad():
        expected = {reason: compute() for reason, (compute, _) in reasons.items()}
        for reason, (compute, limit) in reasons.items():
            with subquad.hf.patch(model) as handle:
                assert distance(compute(), expected[reason]) < limit, reason
                assert handle.report().in_parts == {reason: count}
                assert f"function by function: {reason}: {count} call" in str(handle.report())
                assert handle.report().computed_recurrent["chunk_gated_delta_rule"] >= count


def test_functions_of_others(model, monkeypatch):
    name = "torch_chunk_gated_delta_rule"
    calls = []

    def replacement(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    with torch.no_grad(), subquad.hf.patch(model) as handle:
        original = getattr(modeling_qwen3_5, name)
        with monkeypatch.context() as patched:
            patched.setattr(modeling_qwen3_5, name, replacement)
            whole(model)
        reasons = {"functions that something else has replaced": len(calls)}
        assert handle.report().in_parts == reasons
        assert len(calls) == len(_layers(model))
        whole(model)
        assert handle.report().in_parts == reasons


def test_packed_sequences_are_refused(model):
    layer = _layers(model)[0]
    states = torch.randn(1, 6, model.config.hidden_size)
    with torch.no_grad(), subquad.hf.patch(model), pytest.raises(ValueError, match="packed sequences"):
        layer(states, cu_seq_lens_q=torch.tensor([0, 3, 6]))


class LoudNorm(modeling_qwen3_5.Qwen3_5RMSNormGated):
    """Is of another norm, in the words of the one that is known."""

    def forward(self, hidden_states, gate):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + 2 * self.variance_epsilon + 1)
        return (self.weight * hidden_states * ACT2FN[self.activation](gate)).to(dtype)


class PlainNorm(modeling_qwen3_5.Qwen3_5RMSNormGated):
    """Has other parts."""

    def forward(self, hidden_states, gate):
        return super().forward(hidden_states, gate)


def test_other_layers_of_the_same_parts(model):
    (layer, *_) = _layers(model)

    def check(reason):
        with torch.no_grad():
            expected = whole(model)
            with subquad.hf.patch(model) as handle:
                assert distance(whole(model), expected) < 2e-5
                obstacles = [one.obstacle for one in handle.report().recurrent if not one.whole]
                assert obstacles == [reason]
                assert f"computed function by function: {reason}" in str(handle.report())
                assert handle.report().computed_recurrent["chunk_gated_delta_rule"] == len(_layers(model))

    norm = layer.norm
    norm.__class__ = PlainNorm
    check("its forward refers to more than is known")
    norm.__class__ = LoudNorm
    check("a trial gave other results")
    norm.__class__ = modeling_qwen3_5.Qwen3_5RMSNormGated
    norm.activation = "gelu"
    check("activations or widths of heads that operators do not have")


def test_layers_without_memory(model):
    with subquad.hf.patch(model.to("meta")) as handle:
        assert [one.obstacle for one in handle.report().recurrent] == ["device meta"]


def test_strengths_that_are_doubled_or_not():
    model = build("olmo_hybrid")
    for layer in _layers(model):
        layer.allow_neg_eigval = not layer.allow_neg_eigval
    with torch.no_grad():
        expected = whole(model)
        with subquad.hf.patch(model) as handle:
            assert distance(whole(model), expected) < 2e-5
            assert handle.report().recurrent[0].whole


def test_copy_and_pickle_of_a_patched_layer(model):
    layer = _layers(model)[0]
    states = torch.randn(2, 5, model.config.hidden_size)
    with torch.no_grad():
        expected = layer(states)
        with subquad.hf.patch(model):
            copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
            assert all(distance(one(states), expected) < 2e-5 for one in copies)
        assert all(distance(one(states), expected) < 2e-5 for one in copies)


def test_undo_of_one_of_two(model):
    before = [dict(vars(layer)) for layer in _layers(model)]
    first, second = subquad.hf.patch(model), subquad.hf.patch(model)
    with torch.no_grad():
        whole(model)
        first.undo()
        whole(model)
    counts = [one.report().computed_recurrent[NORM] for one in (first, second)]
    assert counts[1] == 2 * counts[0] > 0
    second.undo()
    assert [vars(layer) for layer in _layers(model)] == before
