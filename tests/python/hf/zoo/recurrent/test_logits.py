"""Patched models with recurrent layers give the logits that they give unpatched."""

from __future__ import annotations

import pytest
import torch

import subquad.hf

from .models import CONVOLUTION, GATED_DELTA, KDA, MAMBA, MAMBA2, RUNS, build, distance

# Type of the model: class of its recurrent layers, and what they call.
FAMILIES = {
    "qwen3_next": ("Qwen3NextGatedDeltaNet", GATED_DELTA, CONVOLUTION),
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet", GATED_DELTA, CONVOLUTION),
    "qwen3_5_moe_text": ("Qwen3_5MoeGatedDeltaNet", GATED_DELTA, CONVOLUTION),
    "qwen4_exp_text": ("Qwen4ExpTextGatedDeltaNet", GATED_DELTA, CONVOLUTION),
    "olmo_hybrid": ("OlmoHybridGatedDeltaNet", GATED_DELTA, CONVOLUTION),
    "lara_mini": ("LaraMiniGatedDeltaNet", GATED_DELTA, CONVOLUTION),
    "kimi_linear": ("KimiLinearDeltaAttention", KDA, CONVOLUTION),
    "bailing_hybrid": ("BailingHybridDeltaAttention", KDA, CONVOLUTION),
    "mamba2": ("Mamba2Mixer", MAMBA2, CONVOLUTION),
    "bamba": ("BambaMixer", MAMBA2, CONVOLUTION),
    "falcon_h1": ("FalconH1Mixer", MAMBA2, CONVOLUTION),
    "granitemoehybrid": ("GraniteMoeHybridMambaLayer", MAMBA2, CONVOLUTION),
    "nemotron_h": ("NemotronHMamba2Mixer", MAMBA2, CONVOLUTION),
    "zamba2": ("Zamba2MambaMixer", MAMBA2, CONVOLUTION),
    "mamba": ("MambaMixer", MAMBA, CONVOLUTION),
    "falcon_mamba": ("FalconMambaMixer", MAMBA, CONVOLUTION),
    "jamba": ("JambaMambaMixer", MAMBA, CONVOLUTION),
    # Its layers have two heads, one call for each.
    "zamba": ("ZambaMambaMixer", MAMBA, MAMBA, CONVOLUTION),
    "lfm2": ("Lfm2ShortConv", CONVOLUTION),
    "lfm2_moe": ("Lfm2MoeShortConv", CONVOLUTION),
    "lfm3": ("Lfm3ShortConv", CONVOLUTION),
    "inkling_text": ("InklingShortConvolution", CONVOLUTION),
    "inkling2_text": ("Inkling2ShortConvolution", CONVOLUTION),
    "inkling2_loop_text": ("Inkling2LoopShortConvolution", CONVOLUTION),
    "minimax": ("MiniMaxLightningAttention", ("chunk_simple_gla",) * 2),
    "xlstm": ("xLSTMBackend", ("mlstm_chunkwise",) * 2),
}
# Calls of `RUNS`: two prompts without a cache, two before single tokens, two in three pieces; six and two single tokens.
LONG, SINGLE = 2 + 2 + 2 * 3, 2 * 3 + 2


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits(kind):
    model = build(kind)
    name, *operators = FAMILIES[kind]
    with torch.no_grad():
        unpatched = {run: compute(model) for run, compute in RUNS.items()}
        with subquad.hf.patch(model) as handle:
            actual = {run: compute(model) for run, compute in RUNS.items()}
            report = handle.report()
        assert all(torch.equal(compute(model), unpatched[run]) for run, compute in RUNS.items())
    expected = dict(unpatched)
    if MAMBA in operators:
        # Unpatched, these forget the state at every piece; all pieces together have to give what the whole does.
        assert distance(unpatched["in pieces"], unpatched["whole"]) > 0.01
        expected |= {"in pieces": unpatched["whole"], "in pieces, padded": unpatched["whole, padded"]}
    worst = {run: distance(actual[run], expected[run]) for run in RUNS}
    assert max(worst.values()) < 2e-5, worst
    (layers,) = report.recurrent
    assert layers.name == name
    assert layers.continues == (MAMBA in operators)
    calls = dict.fromkeys(layers.operators, 0)
    for long, single in operators:
        calls[long] += LONG * layers.count
        calls[single] += SINGLE * layers.count
    if layers.whole:
        calls["rms_norm_gated"] = (LONG + SINGLE) * layers.count
    assert report.computed_recurrent == calls
    assert report.delegated == ()
    assert name not in [one.name for one in report.left_alone]


def test_rwkv():
    # Unpatched, rows of a batch of single tokens see each other.
    model = build("rwkv")
    ids = torch.arange(5, 75)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with subquad.hf.patch(model) as handle:
            first = model(ids[:, :40], use_cache=True)
            second = model(ids[:, 40:69], state=first.state, use_cache=True)
            third = model(ids[:, 69:], state=second.state, use_cache=True)
            actual = torch.cat([first.logits, second.logits, third.logits], 1)
            report = handle.report()
    assert distance(actual, expected) < 1e-5
    (layers,) = report.recurrent
    assert layers.operators == ("fused_recurrent_hgrn",)
    assert report.computed_recurrent == {"fused_recurrent_hgrn": 2 * layers.count}
    assert [(one.reason, one.calls) for one in report.delegated] == [("single tokens", layers.count)]


def test_recurrent_gemma():
    # It keeps its state on the module, and begins anew with every position 0.
    model = build("recurrent_gemma")
    ids = torch.arange(5, 45).view(2, 20)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        expected = torch.stack(model.generate(ids, **options).logits)
        with subquad.hf.patch(model) as handle:
            actual = torch.stack(model.generate(ids, **options).logits)
            report = handle.report()
    assert distance(actual, expected) < 1e-5
    assert report.computed_recurrent == {"fused_recurrent_hgrn": 1}
    assert [(one.reason, one.calls) for one in report.delegated] == [("single tokens", 5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "olmo_hybrid", "mamba2", "mamba", "lfm2"])
def test_dtypes(kind, dtype):
    model = build(kind, dtype)
    # Of two computations in half precision one is not more exact than the other.
    exact = build(kind, torch.float64)
    with torch.no_grad():
        runs = {run: compute for run, compute in RUNS.items() if kind != "mamba" or "pieces" not in run}
        expected = {run: compute(exact) for run, compute in runs.items()}
        unpatched = {run: compute(model) for run, compute in runs.items()}
        with subquad.hf.patch(model) as handle:
            for run, compute in runs.items():
                logits = compute(model)
                assert logits.dtype == unpatched[run].dtype
                own = distance(unpatched[run], expected[run])
                assert distance(logits, expected[run]) < max(3 * own, 1e-5), run
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
