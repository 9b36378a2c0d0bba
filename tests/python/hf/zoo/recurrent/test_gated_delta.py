"""Patched models with gated delta rules give the logits that they give unpatched."""

from __future__ import annotations

import pytest
import torch

import subquad.hf

from .models import GATED_DELTA, KDA, RUNS, build, distance

FAMILIES = {
    "qwen3_next": ("Qwen3NextGatedDeltaNet", GATED_DELTA),
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet", GATED_DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeGatedDeltaNet", GATED_DELTA),
    "qwen4_exp_text": ("Qwen4ExpTextGatedDeltaNet", GATED_DELTA),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet", GATED_DELTA),
    "lara_mini": ("LaraMiniGatedDeltaNet", GATED_DELTA),
    "kimi_linear": ("KimiLinearDeltaAttention", KDA),
    "bailing_hybrid": ("BailingHybridDeltaAttention", KDA),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits(kind):
    try:
        model = build(kind)
    except LookupError:
        pytest.skip(f"this transformers has no {kind}")
    name, operators = FAMILIES[kind]
    with torch.no_grad():
        expected = {run: compute(model) for run, compute in RUNS.items()}
        with subquad.hf.patch(model) as handle:
            actual = {run: compute(model) for run, compute in RUNS.items()}
            report = handle.report()
        assert all(torch.equal(compute(model), expected[run]) for run, compute in RUNS.items())
    worst = {run: distance(actual[run], expected[run]) for run in RUNS}
    assert max(worst.values()) < 2e-5, worst
    (layers,) = report.recurrent
    assert layers.name == name
    assert set(operators) <= set(layers.operators)
    assert not layers.continues
    # 2 + 4 * 1 of them are prompts, 2 * 3 + 2 * 1 single tokens, 2 * 2 pieces that continue.
    assert [report.computed_recurrent[one] for one in operators] == [10 * layers.count, 8 * layers.count]
    assert report.delegated == ()
    assert name not in [one.name for one in report.left_alone]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "olmo_hybrid"])
def test_dtypes(kind, dtype):
    model = build(kind, dtype)
    # Of two computations in half precision one is not more exact than the other.
    exact = build(kind, torch.float64)
    with torch.no_grad():
        expected = {run: compute(exact) for run, compute in RUNS.items()}
        own = {run: distance(compute(model), expected[run]) for run, compute in RUNS.items()}
        with subquad.hf.patch(model) as handle:
            for run, compute in RUNS.items():
                logits = compute(model)
                assert logits.dtype == dtype
                assert distance(logits, expected[run]) < max(3 * own[run], 1e-5), run
            assert handle.report().delegated == ()


def test_generate():
    model = build("qwen3_next")
    ids = torch.arange(5, 25)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(ids, **options)
        beams = model.generate(ids, num_beams=3, **options)
        with subquad.hf.patch(model) as handle:
            assert torch.equal(model.generate(ids, **options), expected)
            assert torch.equal(model.generate(ids, num_beams=3, **options), beams)
            assert handle.report().computed_recurrent["fused_recurrent_gated_delta_rule"] > 10


def test_state_of_decoding_stays_where_it_is():
    model = build("qwen3_next")
    with torch.no_grad(), subquad.hf.patch(model):
        cache = model(torch.arange(5, 25)[None], use_cache=True).cache
        layer = next(one for one in cache.layers if hasattr(one, "recurrent_states"))
        before = layer.recurrent_states[0]
        copied = before.clone()
        model(torch.tensor([[7]]), use_cache=True, cache=cache)
        assert layer.recurrent_states[0] is before
        assert not torch.equal(before, copied)
