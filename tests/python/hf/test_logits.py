"""A patched model gives the logits of the unpatched one."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

import subquad.hf
from subquad.hf.structured_mask import StructuredMask

COMPUTED = (
    "llama",
    "qwen3",
    "mistral",
    "mistral-window",
    "gemma3",
    "gpt2",
    "deepseek-v3",
    "gemma4",
    "gemma2",
    "gpt-oss",
)
DELEGATED = ("deepseek-v3.2",)
PADDING = {"no mask": None, "full": (0, 0), "left": (5, 0), "right": (0, 7), "both": (3, 4)}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", [*COMPUTED, *DELEGATED, "minimax-m3"])
def test_forward(name, padding, decoder, make_batch, assert_same):
    model = decoder(name)
    left, right = PADDING[padding] or (0, 0)
    batch = make_batch(left=left, right=right)
    arguments = {} if PADDING[padding] is None else {"attention_mask": batch.mask}
    with torch.no_grad():
        expected = model(batch.ids, **arguments).logits
        with subquad.hf.patch(model) as handle:
            actual = model(batch.ids, **arguments).logits
            report = handle.report()
    assert_same(actual, expected, batch.mask)
    assert dict(report.dense) == {}
    assert (report.computed == 0) == (name in DELEGATED)
    assert bool(report.delegated) == (name in (*DELEGATED, "minimax-m3"))


@pytest.mark.parametrize("name", COMPUTED)
def test_forward_eager_original(name, decoder, make_batch, assert_same):
    model = decoder(name)
    model.set_attn_implementation("eager")
    batch = make_batch(left=4, right=3)
    with torch.no_grad():
        expected = [model(batch.ids).logits, model(batch.ids, attention_mask=batch.mask).logits]
        with subquad.hf.patch(model) as handle:
            actual = [model(batch.ids).logits, model(batch.ids, attention_mask=batch.mask).logits]
            report = handle.report()
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1], batch.mask)
    assert report.computed > 0
    assert not report.delegated
    assert {one.original for one in report.replaced} == {"eager"}


def test_flex_original(decoder, make_batch, assert_same):
    model = decoder("llama")
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask).logits
        model.set_attn_implementation("flex_attention")
        with subquad.hf.patch(model) as handle:
            # Flex attention itself would need a C++ compiler: it is not called.
            actual = model(batch.ids, attention_mask=batch.mask).logits
            assert not handle.report().delegated
        assert model.config._attn_implementation == "flex_attention"
    assert_same(actual, expected, batch.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, decoder, make_batch):
    model = decoder("llama").to(dtype)
    batch = make_batch(left=4)
    with torch.no_grad():
        exact = decoder("llama").double()(batch.ids, attention_mask=batch.mask).logits
        plain = model(batch.ids, attention_mask=batch.mask).logits
        with subquad.hf.patch(model) as handle:
            patched = model(batch.ids, attention_mask=batch.mask).logits
            assert not handle.report().delegated
    assert patched.dtype == dtype
    tokens = batch.mask.bool()

    def error(logits):
        return (logits.double() - exact)[tokens].abs().max()

    assert error(patched) <= 2 * error(plain) + 1e-12


def test_autocast(decoder, make_batch):
    model = decoder("llama")
    batch = make_batch(left=4)
    tokens = batch.mask.bool()
    with torch.no_grad():
        exact = model(batch.ids, attention_mask=batch.mask).logits[tokens]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = model(batch.ids, attention_mask=batch.mask).logits[tokens]
            with subquad.hf.patch(model) as handle:
                patched = model(batch.ids, attention_mask=batch.mask).logits[tokens]
                assert not handle.report().delegated
    assert patched.dtype == plain.dtype == torch.bfloat16
    assert (patched - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_autocast_casts_as_sdpa_does(decoder):
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    table = AttentionInterface._global_mapping
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), subquad.hf.patch(model):
        outputs = [table[name](layer, query, key, key, None, scaling=0.3)[0] for name in ("subquad", "sdpa")]
    assert [one.dtype for one in outputs] == [torch.bfloat16] * 2


def test_masks_of_the_caller(decoder, make_batch, assert_same):
    model = decoder("llama")
    ids = make_batch(12).ids
    boolean = torch.ones(12, 12, dtype=torch.bool).tril().triu(-4).expand(2, 1, 12, 12)
    additive = torch.where(boolean, 0.0, torch.finfo(torch.float32).min) + torch.randn(2, 1, 12, 12)
    with torch.no_grad():
        for mask in (boolean, additive):
            expected = model(ids, attention_mask=mask).logits
            with subquad.hf.patch(model) as handle:
                assert_same(model(ids, attention_mask=mask).logits, expected)
                assert dict(handle.report().dense) == {"mask of the model": 2}


def test_packed_sequences(decoder, make_batch, assert_same):
    model = decoder("llama")
    ids = make_batch(12, size=1).ids
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        with subquad.hf.patch(model):
            assert_same(model(ids, position_ids=positions).logits, expected)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_is_causal_argument(name, decoder, make_batch, assert_same):
    model = decoder(name)
    ids = make_batch(7).ids
    with torch.no_grad():
        expected = model(ids, is_causal=False).logits
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
        with subquad.hf.patch(model) as handle:
            assert_same(model(ids, is_causal=False).logits, expected)
            assert not handle.report().delegated


@pytest.mark.parametrize("left", [0, 5])
def test_logits_to_keep_with_shared_keys(left, decoder, make_batch, assert_same, calls):
    # Gemma 4 drops queries before its last layers, unless the implementation is "sdpa" and leaves masks out.
    model = decoder("gemma4")
    batch = make_batch(left=left)
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask, logits_to_keep=3).logits
        with subquad.hf.patch(model) as handle:
            actual = model(batch.ids, attention_mask=batch.mask, logits_to_keep=3).logits
            assert not handle.report().delegated
    assert_same(actual, expected, batch.mask[:, -3:])
    assert all(isinstance(mask, StructuredMask) for mask in calls.masks)
    assert [mask.q_length for mask in calls.masks] == [20, 20, 3]


def _sizes(**sizes):
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.25,
        **sizes,
    }


@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (0, 7)])
def test_bert(padding, make_batch, assert_same, calls):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=97, **_sizes())).eval()
    batch = make_batch(left=padding[0], right=padding[1])
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask).last_hidden_state
        with subquad.hf.patch(model) as handle:
            actual = model(batch.ids, attention_mask=batch.mask).last_hidden_state
            report = handle.report()
    assert_same(actual, expected, batch.mask)
    assert (report.computed, report.delegated, dict(report.dense)) == (2, (), {})
    assert calls.causal == [False, False]
    assert calls.biases == [None, None]


def test_vit(assert_same, calls):
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **_sizes())).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        with subquad.hf.patch(model) as handle:
            assert_same(model(pixels).last_hidden_state, expected)
            assert str(handle.report()).count("ViT") >= 2
            assert not handle.report().delegated
    assert calls.masks == [None, None]
    assert calls.causal == [False, False]


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=97,
        d_model=32,
        init_std=0.25,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=64,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_whisper(make_batch, assert_same):
    model = _whisper()
    features, ids = torch.randn(2, 8, 32), make_batch(9).ids
    with torch.no_grad():
        expected = model(features, decoder_input_ids=ids).logits
        with subquad.hf.patch(model) as handle:
            assert_same(model(features, decoder_input_ids=ids).logits, expected)
            report = handle.report()
    # Encoder, decoder and cross attention, in two layers.
    assert (report.computed, report.delegated) == (6, ())
    assert [(one.name, one.count) for one in report.replaced] == [("WhisperAttention", 6)]


def test_whisper_generate():
    model = _whisper()
    features = torch.randn(2, 8, 32)
    with torch.no_grad():
        expected = model.generate(features, max_new_tokens=6, do_sample=False)
        with subquad.hf.patch(model) as handle:
            actual = model.generate(features, max_new_tokens=6, do_sample=False)
            assert handle.report().computed > 0
            assert not handle.report().delegated
    assert torch.equal(actual, expected)


def test_composite_model(assert_same):
    text = {**_sizes(num_key_value_heads=2, head_dim=8), "vocab_size": 97, "pad_token_id": 0}
    vision = {**_sizes(), "image_size": 32, "patch_size": 8, "vision_use_head": False}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**vision),
        image_token_index=96,
        image_seq_length=16,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    ids = torch.tensor([[5, *[96] * 16, 7, 8, 9]])
    arguments = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    names = [config._attn_implementation, "eager", "sdpa"]
    with torch.no_grad():
        expected = model(**arguments).logits
        with subquad.hf.patch(model) as handle:
            assert config.vision_config._attn_implementation == "subquad"
            assert config.text_config._attn_implementation == "subquad"
            assert_same(model(**arguments).logits, expected)
            originals = {one.name: one.original for one in handle.report().replaced}
    assert originals == {"SiglipAttention": "eager", "LlamaAttention": "sdpa"}
    configs = (config, config.vision_config, config.text_config)
    assert [one._attn_implementation for one in configs] == names
    with subquad.hf.patch(model.model.language_model):
        with subquad.hf.patch(model):
            pass
        assert [one._attn_implementation for one in configs] == [*names[:2], "subquad"]
    assert [one._attn_implementation for one in configs] == names
