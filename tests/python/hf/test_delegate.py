"""What subquad does not implement is computed by the original implementation, exactly, and reported."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

import subquad.hf
from subquad.hf.interface import find_seam


def _reasons(handle):
    return {(one.reason, one.original): one.calls for one in handle.report().delegated}


def _call(model, mask=None, *, heads=(4, 2), length=5, **kwargs):
    """Calls subquad's attention function as the first layer of a model would."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, count, length, 8, generator=generator) for count in (heads[0], heads[1], heads[1])
    )
    layer = model.model.layers[0].self_attn
    name = layer.config._attn_implementation
    function = find_seam(layer).eager if name == "eager" else AttentionInterface._global_mapping[name]
    return function(layer, query, key, value, mask, **{"scaling": 0.3, **kwargs})


@pytest.mark.parametrize(
    ("name", "reason", "original"),
    [("deepseek-v3.2", "indices", "sdpa")],
)
def test_models(name, reason, original, decoder, make_batch):
    model = decoder(name)
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask).logits
        with subquad.hf.patch(model) as handle:
            actual = model(batch.ids, attention_mask=batch.mask).logits
            assert _reasons(handle) == {(reason, original): 2}
            model(batch.ids)
            assert _reasons(handle) == {(reason, original): 4}
            assert f"{reason}: 4 calls delegated to {original}" in str(handle.report())
            assert handle.report().computed == 0
    assert torch.equal(actual[batch.mask.bool()], expected[batch.mask.bool()])


def test_sparse_models_choose_keys(decoder, make_batch):
    # Their choice is lost if `indices` is ignored: check that this would be seen.
    model = decoder("deepseek-v3.2")
    ids = make_batch().ids
    with torch.no_grad():
        sparse = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.indexer.index_topk = 20
        assert (model(ids).logits - sparse).abs().max() > 1e-2


def test_blocks(decoder, make_batch, assert_same):
    model = decoder("minimax-m3")
    ids = make_batch().ids
    with torch.no_grad():
        expected = model(ids).logits
        with subquad.hf.patch(model) as handle:
            assert_same(model(ids).logits, expected)
            assert _reasons(handle) == {("block_indices", "sdpa"): 1}
        # With all blocks chosen, the choice would not be missed.
        model.model.layers[1].self_attn.indexer.topk_blocks = 20
        assert (model(ids).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_position_bias(original, make_batch):
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=5.0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if all(find_seam(module) is None for module in model.modules()):
        pytest.skip("T5 does not use the interface in this transformers")
    batch = make_batch(left=3)
    arguments = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "decoder_input_ids": make_batch(7).ids,
    }
    double = copy.deepcopy(model).double()
    model.set_attn_implementation(original)
    with torch.no_grad():
        exact = double(**arguments).logits
        plain = model(**arguments).logits
        with subquad.hf.patch(model) as handle, subquad.hf.patch(double):
            patched = model(**arguments).logits
            # In float64 for what it computes; in float32 rounding grows with such large logits.
            torch.testing.assert_close(double(**arguments).logits, exact, atol=1e-10, rtol=0)
            report = handle.report()
    assert (patched - exact).abs().max() <= 3 * (plain - exact).abs().max()
    # Encoder, decoder and cross attention, in two layers.
    assert (report.computed, report.delegated) == (6, ())


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
        assert _call(model, **given) == "answer"
        assert {name: seen[name] for name in given} == given
        assert _reasons(handle) == {(reason, original): 1}
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
        expected = _call(model, **given)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, **given)[0], expected)
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
    expected = _call(model, torch.where(chosen, 0.0, least)[None, None])[0]
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        assert_same(_call(model, masks[kind], indices=indices)[0], expected)
        assert _reasons(handle) == {("indices", original): 1}


def test_block_indices_without_indexer(decoder):
    model = decoder("llama")
    with torch.no_grad(), subquad.hf.patch(model), pytest.raises(NotImplementedError, match="block_indices"):
        _call(model, block_indices=torch.zeros(2, 2, 5, 1, dtype=torch.long))


def test_paged_cache(decoder, monkeypatch):
    model = decoder("llama")
    monkeypatch.delitem(AttentionInterface._global_mapping, "paged|sdpa", raising=False)
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        with pytest.raises(NotImplementedError, match="paged"):
            _call(model, cache=object())
        with monkeypatch.context() as context:
            context.setitem(
                AttentionInterface._global_mapping, "paged|sdpa", lambda *_args, **_kwargs: "paged"
            )
            assert _call(model, cache=object()) == "paged"
        assert _reasons(handle) == {("cache", "sdpa"): 2}


def test_gradients(decoder, make_batch):
    ids = make_batch().ids

    def gradients(model):
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(decoder("llama").train())
    model = decoder("llama").train()
    with subquad.hf.patch(model) as handle:
        actual = gradients(model)
        ((reason, original),) = _reasons(handle)
    assert "gradients are enabled" in reason
    assert original == "sdpa"
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_gradients_of_padded_eager_model(decoder, make_batch):
    model = decoder("llama")
    model.set_attn_implementation("eager")
    batch = make_batch(left=4)
    expected = model(batch.ids, attention_mask=batch.mask).logits
    with subquad.hf.patch(model) as handle:
        actual = model(batch.ids, attention_mask=batch.mask).logits
        assert handle.report().computed == 0
    assert torch.equal(actual, expected)


def test_dropout(decoder, make_batch):
    model = decoder("llama", attention_dropout=0.5).train()
    ids = make_batch().ids
    with torch.no_grad():
        torch.manual_seed(3)
        expected = model(ids).logits
        with subquad.hf.patch(model) as handle:
            torch.manual_seed(3)
            assert torch.equal(model(ids).logits, expected)
            assert _reasons(handle) == {("dropout", "sdpa"): 2}


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_weights(by, decoder, make_batch):
    model = decoder("llama")
    model.set_attn_implementation("eager")
    batch = make_batch(left=4)
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if by == "argument":
        arguments["output_attentions"] = True
    else:
        model.config.output_attentions = True
    with torch.no_grad():
        expected = model(**arguments).attentions
        with subquad.hf.patch(model) as handle:
            actual = model(**arguments).attentions
            assert _reasons(handle) == {("output_attentions", "eager"): 2}
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (((1, 2, 3, 1025), (1, 2, 3, 1025)), "head_dim above 1024"),
        (((1, 4, 5, 8), (2, 4, 5, 8)), "shapes that broadcast"),
        (((2, 4, 0, 8), (2, 4, 5, 8)), "empty tensors"),
        (((2, 4, 5, 8), (2, 4, 3, 8)), "more causal queries than keys"),
        (((4, 5, 8), (4, 5, 8)), "tensors that are not 4-dimensional"),
    ],
)
def test_shapes(shapes, reason, decoder):
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    layer.num_key_value_groups = 1
    query, key = (torch.randn(shape) for shape in shapes)
    with torch.no_grad(), subquad.hf.patch(model) as handle, pytest.MonkeyPatch.context() as context:
        table = AttentionInterface._global_mapping
        context.setitem(table, "sdpa", lambda *_args, **_kwargs: "answer")
        assert table["subquad"](layer, query, key, key, None, scaling=1.0) == "answer"
        assert _reasons(handle) == {(reason, "sdpa"): 1}


def test_masks_of_unknown_kinds(decoder):
    model = decoder("llama")
    with torch.no_grad(), subquad.hf.patch(model) as handle, pytest.MonkeyPatch.context() as context:
        context.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **_kwargs: args[4])
        masks = (object(), torch.ones(5, 5, dtype=torch.int64), torch.ones(5, 5, device="meta"))
        assert all(_call(model, mask) is mask for mask in masks)
        with torch.enable_grad():
            _call(model, torch.zeros(1, 1, 5, 5, requires_grad=True))
        assert [reason for reason, _ in _reasons(handle)] == [
            "mask of type object",
            "mask of dtype int64",
            "mask on device meta",
            "gradients are enabled (torch.no_grad() disables them)",
        ]


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_no_mask_means_what_it_means_to_the_original(is_causal, original, decoder, assert_same):
    model = decoder("llama")
    model.set_attn_implementation(original)
    with torch.no_grad():
        expected = _call(model, is_causal=is_causal)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, is_causal=is_causal)[0], expected)
            assert handle.report().computed == 1


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([True, False]).view(2, 1, 1, 1),
        torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)[:, None, None],
        torch.ones(5, 5, dtype=torch.bool).tril(),
        torch.ones(1, 5, 5, dtype=torch.bool).tril(),
        torch.ones(1, 4, 5, 5, dtype=torch.bool).tril(),
        torch.randn(1, 4, 5, 5),
        torch.randn(2, 1, 1, 5),
    ],
)
def test_masks_broadcast(mask, decoder, assert_same):
    model = decoder("llama")
    with torch.no_grad():
        expected = _call(model, mask)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, mask)[0], expected)
            assert handle.report().computed == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float64, torch.float16])
def test_mask_dtypes(mask_dtype, dtype, decoder):
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    query = torch.randn(2, 4, 5, 8, dtype=dtype)
    mask = torch.randint(2, (2, 1, 5, 5)).to(mask_dtype)
    additive = mask.to(dtype) if mask_dtype != torch.bool else mask
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        table = AttentionInterface._global_mapping
        expected = table["sdpa"](layer, query, query[:, :2], query[:, :2], additive, scaling=0.3)[0]
        actual = table["subquad"](layer, query, query[:, :2], query[:, :2], mask, scaling=0.3)[0]
        assert handle.report().computed == 1
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    tokens = mask.any(-1)[:, 0] if mask_dtype == torch.bool else slice(None)
    torch.testing.assert_close(actual[tokens], expected[tokens], atol=tolerance, rtol=0)


def test_device(decoder):
    model = decoder("llama").to("meta")
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        model(torch.zeros(1, 5, dtype=torch.long, device="meta"))
        report = handle.report()
    assert report.replaced == ()
    assert [(one.name, one.count) for one in report.left_alone] == [("LlamaAttention", 2)]
    assert "device meta" in report.left_alone[0].reason
    assert _reasons(handle) == {("device meta", "sdpa"): 2}


def test_eager_attention_that_is_not_known(decoder, assert_same):
    # It reads `module.sinks`, whether or not the model passes them as an argument.
    model = decoder("gpt-oss")
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(3.0)
        expected = _call(model)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model)[0], expected)
            assert _reasons(handle) == {("an eager attention of its own", "eager"): 1}


_OF_HEADS = torch.linspace(-1.0, 2.0, 4)
_OF_QUERIES = torch.linspace(-1.0, 2.0, 40).reshape(2, 4, 5, 1)
_BIAS = torch.linspace(-2.0, 2.0, 100).reshape(1, 4, 5, 5)
_CHOICE = torch.tensor([[[0, 1]] * 5] * 2)
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
        expected = _call(model, mask, **given)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, mask, **given)[0], expected)
            report = handle.report()
    assert _reasons(handle) == ({} if reason is None else {(reason, original): 1})
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
        expected = _call(model, _CAUSAL, scaling=scaling)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, _CAUSAL, scaling=scaling)[0], expected)
            assert _reasons(handle) == ({} if reason is None else {(reason, "eager"): 1})


@pytest.mark.parametrize("given", [{"softcap": 1.5}, {"s_aux": _OF_HEADS}], ids=["softcap", "s_aux"])
def test_scores_of_models_that_change_them(given, decoder, assert_same):
    model = decoder("gemma2" if "softcap" in given else "gpt-oss")
    model.set_attn_implementation("eager")
    if "s_aux" in given:
        given = {"s_aux": model.model.layers[0].self_attn.sinks}
    with torch.no_grad():
        if "s_aux" in given:
            given["s_aux"].copy_(_OF_HEADS)
        expected = _call(model, _CAUSAL[None, None], **given)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, _CAUSAL[None, None], **given)[0], expected)
            assert (handle.report().computed, handle.report().delegated) == (1, ())


def test_sinks_that_the_original_reads_elsewhere(decoder):
    # gpt-oss reads its parameter, whatever argument it gets.
    model = decoder("gpt-oss")
    with torch.no_grad():
        expected = _call(model, _CAUSAL[None, None], s_aux=_OF_HEADS + 3)[0]
        with subquad.hf.patch(model) as handle:
            assert torch.equal(_call(model, _CAUSAL[None, None], s_aux=_OF_HEADS + 3)[0], expected)
            assert _reasons(handle) == {("s_aux", "eager"): 1}


def test_softcap_with_sdpa(decoder, assert_same):
    # SDPA raises an error for it; subquad computes it, as Gemma's eager function does.
    model = decoder("llama")
    with torch.no_grad():
        with pytest.raises(ValueError, match="softcap"):
            _call(model, _CAUSAL[None, None], softcap=1.5)
        gemma = decoder("gemma2")
        gemma.set_attn_implementation("eager")
        expected = _call(gemma, _CAUSAL[None, None], softcap=1.5)[0]
        with subquad.hf.patch(model) as handle:
            assert_same(_call(model, softcap=1.5)[0], expected)
            assert (handle.report().computed, handle.report().delegated) == (1, ())
            with pytest.raises(ValueError, match="softcap"):
                _call(model, softcap=0.0)
            assert _reasons(handle) == {("softcap that is no positive number", "sdpa"): 1}


def test_dropout_argument(decoder):
    model = decoder("llama").train()
    with torch.no_grad():
        torch.manual_seed(3)
        expected = _call(model, dropout=0.5)[0]
        with subquad.hf.patch(model) as handle:
            torch.manual_seed(3)
            assert torch.equal(_call(model, dropout=0.5)[0], expected)
            assert _reasons(handle) == {("dropout", "sdpa"): 1}


def test_gradients_of_a_bias(decoder):
    model = decoder("llama")
    bias = _BIAS.clone().requires_grad_()
    with subquad.hf.patch(model) as handle:
        assert _call(model, position_bias=bias)[0].requires_grad
        assert handle.report().computed == 0
