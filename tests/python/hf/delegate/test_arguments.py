"""What the original makes of an argument is what the patched model makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

import subquad.hf

from .layer_calls import call, reasons


@pytest.mark.parametrize(
    ("given", "reason", "original"),
    [
        # With "sdpa", subquad computes these two.
        ({"softcap": 30.0}, "softcap", "eager"),
        ({"position_bias": torch.randn(2, 4, 5, 5)}, "position_bias", "eager"),
        *(
            (given, reason, original)
            for original in ("sdpa", "eager")
            for given, reason in [
                ({"s_aux": torch.zeros(4)}, "s_aux"),
                ({"sinks": torch.zeros(2, 4, 5, 1)}, "sinks"),
                ({"indices": torch.tensor([[[0, 1]] * 5] * 2)}, "indices"),
                ({"output_attentions": True}, "output_attentions"),
                ({"no_such_argument": 1}, "no_such_argument (unknown keyword argument)"),
                ({"no_such_argument": False}, "no_such_argument (unknown keyword argument)"),
                ({"sliding_window": 3}, "sliding_window"),
            ]
        ),
    ],
)
def test_arguments(given, reason, original, decoder, monkeypatch):
    model = decoder("llama")
    model.set_attn_implementation(original)
    layer = model.model.layers[0].self_attn
    seen = {}

    def answer(*_args, **kwargs):
        nonlocal seen
        seen = kwargs
        return "answer"

    # What the original makes of an argument is its affair: it has to get it, and its answer to be returned.
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", answer)
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        if original == "eager":
            binding = layer._subquad_binding
            seam = replace(binding.original.seam, eager=answer)
            monkeypatch.setattr(
                layer, "_subquad_binding", replace(binding, original=replace(binding.original, seam=seam))
            )
        assert call(model, **given) == "answer"
        assert {name: seen[name] for name in given} == given
        assert reasons(handle) == {(reason, original): 1}
        assert handle.report().computed == 0
        monkeypatch.undo()


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.arange(5)[None], "use_cache": True, "output_router_logits": True},
        {"softcap": None, "s_aux": None, "indices": None, "sliding_window": None, "anything": None},
        {"sliding_window": 5},
        {"output_attentions": False, "output_hidden_states": True, "cache_position": torch.arange(5)},
        {"cu_seq_lens_q": None, "max_length_q": 5, "num_items_in_batch": 3},
    ],
)
def test_harmless_arguments(given, decoder, assert_same):
    model = decoder("llama")
    with torch.no_grad():
        expected = call(model, **given)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, **given)[0], expected)
            assert (handle.report().computed, handle.report().delegated) == (1, ())


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_indices(kind, original, decoder, assert_same):
    model = decoder("llama")
    model.set_attn_implementation(original)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    least = torch.finfo(torch.float32).min
    masks = {
        "none": None,
        "boolean": causal[None, None],
        "additive": torch.where(causal, 0.0, least)[None, None],
    }
    if (kind, original) == ("boolean", "eager"):
        pytest.skip("eager attention adds masks")
    indices = torch.tensor([[0, -1, 3], [1, 0, -1], [2, 0, -1], [3, 4, 0], [2, 4, 1]]).expand(2, 5, 3)
    chosen = torch.zeros(5, 5, dtype=torch.bool)
    for query, keys in enumerate(indices[0]):
        chosen[query, keys[keys >= 0]] = True
    if kind != "none" or original == "sdpa":
        chosen &= causal
    expected = call(model, torch.where(chosen, 0.0, least)[None, None])[0]
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        assert_same(call(model, masks[kind], indices=indices)[0], expected)
        assert reasons(handle) == {("indices", original): 1}


def test_block_indices_without_indexer(decoder):
    model = decoder("llama")
    with torch.no_grad(), subquad.hf.patch(model), pytest.raises(NotImplementedError, match="block_indices"):
        call(model, block_indices=torch.zeros(2, 2, 5, 1, dtype=torch.long))


def test_paged_cache(decoder, monkeypatch):
    model = decoder("llama")
    monkeypatch.delitem(AttentionInterface._global_mapping, "paged|sdpa", raising=False)
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        with pytest.raises(NotImplementedError, match="paged"):
            call(model, cache=object())
        with monkeypatch.context() as context:
            context.setitem(
                AttentionInterface._global_mapping, "paged|sdpa", lambda *_args, **_kwargs: "paged"
            )
            assert call(model, cache=object()) == "paged"
        assert reasons(handle) == {("cache", "sdpa"): 2}


def test_eager_attention_that_is_not_known(decoder, assert_same):
    # It reads `module.sinks`, whether or not the model passes them as an argument.
    model = decoder("gpt-oss")
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(3.0)
        expected = call(model)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model)[0], expected)
            assert reasons(handle) == {("an eager attention of its own", "eager"): 1}


_OF_HEADS = torch.linspace(-1.0, 2.0, 4)
_OF_QUERIES = torch.linspace(-1.0, 2.0, 40).reshape(2, 4, 5, 1)
_BIAS = torch.linspace(-2.0, 2.0, 100).reshape(1, 4, 5, 5)
_CAUSAL = torch.where(torch.ones(5, 5, dtype=torch.bool).tril(), 0.0, torch.finfo(torch.float32).min)


# What the original does with an argument is what the patched model does: (argument, original) to the reason for
# delegating it, or None if subquad computes it.
@pytest.mark.parametrize(
    ("given", "eager", "sdpa"),
    [
        # The usual eager function knows none of these three and ignores them; so does SDPA, soft-caps apart.
        ({"s_aux": _OF_HEADS}, "s_aux", "s_aux"),
        ({"sinks": _OF_HEADS}, "sinks", "sinks"),
        ({"sinks": _OF_QUERIES}, "sinks", "sinks"),
        ({"position_bias": _BIAS}, "position_bias", None),
        ({"sliding_window": 3}, "sliding_window", "sliding_window"),
        ({"sliding_window": 5}, None, None),
        ({"scaling": 1.7}, None, None),
        ({"is_causal": True}, None, None),
        ({"is_causal": False}, None, None),
        ({"output_attentions": True}, "output_attentions", "output_attentions"),
        ({"no_such_argument": 1}, *["no_such_argument (unknown keyword argument)"] * 2),
    ],
)
@pytest.mark.parametrize("mask", [None, _CAUSAL], ids=["no mask", "mask"])
@pytest.mark.parametrize("original", ["eager", "sdpa"])
def test_every_argument(original, mask, given, eager, sdpa, decoder, assert_same):
    model = decoder("llama")
    model.set_attn_implementation(original)
    reason = {"eager": eager, "sdpa": sdpa}[original]
    if reason == "sliding_window" and mask is not None:
        # Neither function reads it: the mask has the window.
        reason = None
    with torch.no_grad():
        expected = call(model, mask, **given)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, mask, **given)[0], expected)
            report = handle.report()
    assert reasons(handle) == ({} if reason is None else {(reason, original): 1})
    assert report.computed == (reason is None)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [(torch.tensor(1.7), None), (torch.ones(1, 4, 1, 1), "scaling of type Tensor")],
    ids=["one element", "by head"],
)
def test_scaling_as_a_tensor(scaling, reason, decoder, assert_same):
    model = decoder("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = call(model, _CAUSAL, scaling=scaling)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, _CAUSAL, scaling=scaling)[0], expected)
            assert reasons(handle) == ({} if reason is None else {(reason, "eager"): 1})


@pytest.mark.parametrize("given", [{"softcap": 1.5}, {"s_aux": _OF_HEADS}], ids=["softcap", "s_aux"])
def test_scores_of_models_that_change_them(given, decoder, assert_same):
    model = decoder("gemma2" if "softcap" in given else "gpt-oss")
    model.set_attn_implementation("eager")
    if "s_aux" in given:
        given = {"s_aux": model.model.layers[0].self_attn.sinks}
    with torch.no_grad():
        if "s_aux" in given:
            given["s_aux"].copy_(_OF_HEADS)
        expected = call(model, _CAUSAL[None, None], **given)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, _CAUSAL[None, None], **given)[0], expected)
            assert (handle.report().computed, handle.report().delegated) == (1, ())


def test_sinks_that_the_original_reads_elsewhere(decoder):
    # gpt-oss reads its parameter, whatever argument it gets.
    model = decoder("gpt-oss")
    with torch.no_grad():
        expected = call(model, _CAUSAL[None, None], s_aux=_OF_HEADS + 3)[0]
        with subquad.hf.patch(model) as handle:
            assert torch.equal(call(model, _CAUSAL[None, None], s_aux=_OF_HEADS + 3)[0], expected)
            assert reasons(handle) == {("s_aux", "eager"): 1}


def test_softcap_with_sdpa(decoder, assert_same):
    # SDPA raises an error for it; subquad computes it, as Gemma's eager function does.
    model = decoder("llama")
    with torch.no_grad():
        with pytest.raises(ValueError, match="softcap"):
            call(model, _CAUSAL[None, None], softcap=1.5)
        gemma = decoder("gemma2")
        gemma.set_attn_implementation("eager")
        expected = call(gemma, _CAUSAL[None, None], softcap=1.5)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(call(model, softcap=1.5)[0], expected)
            assert (handle.report().computed, handle.report().delegated) == (1, ())
            with pytest.raises(ValueError, match="softcap"):
                call(model, softcap=0.0)
            assert reasons(handle) == {("softcap that is no positive number", "sdpa"): 1}


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_dropout(original, decoder):
    model = decoder("llama").train()
    model.set_attn_implementation(original)
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        outs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            outs.append(call(model, dropout=0.5)[0])
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
        whole = call(model)[0]
        torch.testing.assert_close(call(model, dropout=1e-9)[0], whole)
        # Eager functions drop while they are trained, SDPA always.
        model.eval()
        assert torch.equal(call(model, dropout=0.5)[0], whole) == (original == "eager")
        assert reasons(handle) == {}


def test_dropout_of_everything_is_delegated(decoder):
    model = decoder("llama")
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        assert not call(model, dropout=1.0)[0].any()
        assert reasons(handle) == {("dropout that is no number from 0 to below 1", "sdpa"): 1}


def test_gradients_of_a_bias(decoder):
    model = decoder("llama")
    bias = _BIAS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(model, position_bias=bias)[0].square().sum(), bias)
    with subquad.hf.patch(model) as handle:
        (actual,) = torch.autograd.grad(call(model, position_bias=bias)[0].square().sum(), bias)
        assert handle.report().computed == 1
    torch.testing.assert_close(actual, expected)
