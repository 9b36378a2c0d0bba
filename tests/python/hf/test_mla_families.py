"""Every family of multi-head latent attention in transformers: prompts, pieces and tokens, against eager."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import transformers

import subquad.hf

VOCABULARY = 97
PIECES = (7, 20, 1, 1, 2, 1)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # With the usual 0.02, attention is nearly uniform and an error in it hardly changes the logits.
    "initializer_range": 0.25,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
# Scores are scaled by the square of a logarithm of the factor.
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_INDEXER = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
_HYBRID = {
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "num_local_experts": 4,
}
_LONGCAT = {
    "head_dim": 8,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
    "moe_topk": 2,
    "zero_expert_num": 2,
}
_HY_VL = {
    **_INDEXER,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_LLAMA_4_SCALING = {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}}
_POOLED = {
    **_HYBRID,
    **_INDEXER,
    "layer_types": ["linear_attention", "indexed_attention"],
    "index_kpool": 2,
    "qk_rope_head_dim": 0,
}


class Family(NamedTuple):
    """Name of the model's class in transformers, sizes that differ, and what is delegated."""

    model: str
    sizes: dict[str, Any]
    delegated: str | None = None


FAMILIES = {
    "axk1": Family("AXK1ForCausalLM", {}),
    "bailing": Family("BailingHybridForCausalLM", {**_HYBRID, "num_expert_group": 1}),
    "deepseek-v2": Family("DeepseekV2ForCausalLM", {}),
    "deepseek-v2 without q_lora": Family("DeepseekV2ForCausalLM", {"q_lora_rank": None}),
    "deepseek-v3": Family("DeepseekV3ForCausalLM", {}),
    "deepseek-v3 without q_lora": Family("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    "deepseek-v3 in halves": Family("DeepseekV3ForCausalLM", {"rope_interleave": False}),
    "deepseek-v3 yarn": Family("DeepseekV3ForCausalLM", {"rope_parameters": _YARN}),
    "deepseek-v3 with biases": Family("DeepseekV3ForCausalLM", {"attention_bias": True}),
    "glm-4 lite": Family("Glm4MoeLiteForCausalLM", {}),
    "kimi linear": Family("KimiLinearForCausalLM", _HYBRID),
    "longcat": Family("LongcatFlashForCausalLM", _LONGCAT),
    "minicpm3": Family("MiniCPM3ForCausalLM", {}),
    "mistral 4": Family("Mistral4ForCausalLM", _LLAMA_4_SCALING),
    "youtu": Family("YoutuForCausalLM", {}),
    "axk2": Family("AXK2ForCausalLM", _INDEXER, "indices"),
    "deepseek-v3.2": Family("DeepseekV32ForCausalLM", _INDEXER, "indices"),
    "dots": Family("Dots3NoteForCausalLM", _INDEXER, "indices"),
    "glm dsa": Family("GlmMoeDsaForCausalLM", _INDEXER, "indices"),
    "hy 4": Family("HYV4ForCausalLM", _INDEXER, "indices"),
    "hy 4 vl": Family("HYV4VLTextModel", _HY_VL, "indices"),
    "mistral large 4": Family("MistralLarge4TextModel", {**_INDEXER, "head_dim": 8}, "indices"),
    "glm 5 next": Family("Glm5NextTextModel", _POOLED),
}
GENERATING = [name for name, one in FAMILIES.items() if one.model.endswith("ForCausalLM")]


def _build(name):
    family = FAMILIES[name]
    cls = getattr(transformers, family.model, None)
    if cls is None:
        pytest.skip(f"this transformers has no {family.model}")
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**_SIZES, **family.sizes})).eval()
    model.set_attn_implementation("eager")
    return model


def _run(model, batch, cache):
    """Runs a model on the pieces of a batch."""
    outputs, start = [], 0
    for count in PIECES:
        end = start + count
        output = model(batch.ids[:, start:end], attention_mask=batch.mask[:, :end], cache=cache)
        outputs.append(output[0])
        start = end
    return torch.cat(outputs, dim=1)


def _assert_close(actual, expected):
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", [transformers.DynamicCache, subquad.hf.GrowingCache])
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces(name, kind, make_batch):
    model, family = _build(name), FAMILIES[name]
    batch = make_batch(sum(PIECES), left=5)
    tokens = batch.mask.bool()
    with torch.no_grad():
        expected = _run(model, batch, transformers.DynamicCache(config=model.config))
        with subquad.hf.patch(model) as handle:
            actual = _run(model, batch, kind(config=model.config))
            report = handle.report()
    _assert_close(actual[tokens], expected[tokens])
    assert report.latent
    assert all(one.reason is None for one in report.latent)
    layers = sum(one.count for one in report.latent)
    if family.delegated is None:
        assert not report.delegated
        # The first piece has no past to expand again, and the second is long.
        assert report.on_latents == layers * (len(PIECES) - 2)
        assert report.computed == layers * len(PIECES)
    else:
        assert {one.reason for one in report.delegated} == {family.delegated}
        assert report.on_latents == 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name, options, make_batch):
    model = _build(name)
    batch = make_batch(12, left=5)
    options = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, **options}

    def generate():
        return model.generate(batch.ids, attention_mask=batch.mask, return_dict_in_generate=True, **options)

    expected = generate()
    with subquad.hf.patch(model) as handle:
        actual = generate()
        assert bool(handle.report().on_latents) == (FAMILIES[name].delegated is None)
    assert torch.equal(actual.sequences, expected.sequences)
    if "num_beams" not in options:
        _assert_close(torch.stack(actual.logits), torch.stack(expected.logits))
