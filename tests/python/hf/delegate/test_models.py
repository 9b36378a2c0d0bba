"""What subquad does not implement is computed by the original implementation, exactly, and reported: models."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import subquad.hf
from subquad.hf.interface import find_seam

from .layer_calls import reasons


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
            assert reasons(handle) == {(reason, original): 2}
            model(batch.ids)
            assert reasons(handle) == {(reason, original): 4}
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
            assert reasons(handle) == {("block_indices", "sdpa"): 1}
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
            assert reasons(handle) == {("output_attentions", "eager"): 2}
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_device(decoder):
    model = decoder("llama").to("meta")
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        model(torch.zeros(1, 5, dtype=torch.long, device="meta"))
        report = handle.report()
    assert report.replaced == ()
    assert [(one.name, one.count) for one in report.left_alone] == [("LlamaAttention", 2)]
    assert "device meta" in report.left_alone[0].reason
    assert reasons(handle) == {("device meta", "sdpa"): 2}
