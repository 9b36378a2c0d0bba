"""What single models need apart from the general rules, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers


class Part(NamedTuple):
    """Stands for the tiny configuration of a model type."""

    kind: str


_THREE_AXES = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 2, 2]}


def _backbone(levels: int = 1) -> transformers.PreTrainedConfig:
    """Returns a small convolutional network in place of one that a package would have to load."""
    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{level}" for level in range(5 - levels, 5)],
    )


# Fields of configurations.
SIZES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 100},
    "chameleon": {"vocabulary_map": {"<image>": 100, "<racm3:break>": 101, "<eoss>": 102}},
    "clap_audio_model": {"num_mel_bins": 64},
    "cohere_compass_text": {
        "rope_parameters": {kind: _THREE_AXES for kind in ("full_attention", "sliding_attention")}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_THREE_AXES, "mrope_section": [3, 3, 2]}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4": {"vision_config": Part("gemma4_vision")},
    "gemma4_text": {
        "use_bidirectional_attention": "vision",
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_vision": {"pooling_kernel_size": 2},
    "glm5_next_text": {"index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "instructblip": {"image_token_index": 100},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": {"rope_parameters": _THREE_AXES},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 128,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "sam2_vision_model": {"backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "step3p5": {"sliding_window": 8},
    "swin": {"image_size": 128, "window_size": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
}
# Fields that several models need.
for _kinds, _fields in (
    (("eomt", "eomt_dinov3", "videomt"), {"num_blocks": 1}),
    (("llava_next", "llava_next_video", "llava_onevision"), {"image_grid_pinpoints": [[32, 32]]}),
    (("sam_vision_model", "sam_hq_vision_model"), {"num_pos_feats": 32}),
    (("wav2vec2-bert", "wav2vec2-conformer"), {"vocab_size": 32}),
    (("wavtokenizer", "wavtokenizer_encoder"), {"codebook_dim": 64}),
    (("autoformer", "informer", "time_series_transformer"), {"prediction_length": 8}),
    (("conditional_detr", "dab-detr", "detr", "table-transformer"), {"backbone_config": _backbone()}),
    (
        (
            "d_fine",
            "deimv2",
            "pp_doclayout_v2",
            "pp_doclayout_v3",
            "pp_doclayout_v4",
            "rt_detr",
            "rt_detr_v2",
        ),
        {"d_model": 256, "encoder_hidden_dim": 256},
    ),
    (
        ("depth_anything", "prompt_depth_anything", "tipsv2_dpt", "zoedepth"),
        {"reassemble_hidden_size": 64, "backbone_hidden_size": 64},
    ),
    (("edgetam_prompt_encoder", "sam2_prompt_encoder"), {"patch_size": 16}),
    (("deformable_detr",), {"backbone_config": _backbone(3)}),
):
    SIZES.update(dict.fromkeys(_kinds, _fields))


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, 100, shape, generator=torch.Generator().manual_seed(7))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _navit(model: Any) -> dict[str, Any]:
    """Returns images as patches with the numbers of rows and columns."""
    config = getattr(model.config, "vision_config", model.config)
    shapes = torch.tensor([[4, 4], [2, 8]])
    patches = _noise(2, 16, config.num_channels * config.patch_size**2)
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": shapes}


def _places() -> torch.Tensor:
    """Returns the places of the patches of two images."""
    return torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, 16, 2)


def _pooled(model: Any) -> dict[str, Any]:
    """Returns text with images of any shape, of which four patches become a token."""
    config = model.config
    ids = torch.cat([_tokens(2, 5), torch.full((2, 4), config.image_token_id), _tokens(2, 15)], dim=1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": _noise(2, 16, 3 * config.vision_config.patch_size**2),
        "image_position_ids": _places(),
    }


def _series(model: Any) -> dict[str, Any]:
    past = model.config.context_length + max(model.config.lags_sequence)
    return {
        "past_values": _noise(2, past),
        "past_time_features": _noise(2, past, 0),
        "past_observed_mask": torch.ones(2, past),
        "future_values": _noise(2, 8),
        "future_time_features": _noise(2, 8, 0),
    }


def _queries(model: Any) -> dict[str, Any]:
    """Returns pictures and what to look for in them."""
    del model
    ids = _tokens(2, 12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _noise(2, 3, 32, 32)}


def _question(model: Any) -> dict[str, Any]:
    """Returns pictures with text for the model that reads them and for the one that answers."""
    images = torch.full((2, model.config.num_query_tokens), model.config.image_token_index)
    return {
        "pixel_values": _noise(2, 3, 32, 32),
        "qformer_input_ids": _tokens(2, 12),
        "input_ids": torch.cat([images, _tokens(2, 24)], dim=1),
    }


def _kosmos(model: Any) -> dict[str, Any]:
    places = torch.zeros(2, 24, dtype=torch.long)
    places[:, 1 : 1 + model.config.latent_query_num] = 1
    return {
        "pixel_values": _noise(2, 3, 32, 32),
        "input_ids": _tokens(2, 24),
        "image_embeds_position_mask": places,
    }


# Inputs of models that take others than models of their kind.
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "clap": lambda model: {"input_ids": _tokens(2, 24), "input_features": _noise(2, 1, 1024, 64)},
    "dia": lambda model: {"input_ids": _tokens(2, 24), "decoder_input_ids": _tokens(2, 10, 9)},
    "gemma4_vision": lambda model: {
        "pixel_values": _noise(2, 16, 3 * model.config.patch_size**2),
        "pixel_position_ids": _places(),
    },
    **dict.fromkeys(
        ("granite_speech5_ctc", "granite_speech5_encoder"),
        lambda model: {"input_features": _noise(2, 160, 64)},
    ),
    "idefics": lambda model: {
        "input_ids": _tokens(2, 24),
        "pixel_values": _noise(2, 1, 3, 32, 32),
        "image_attention_mask": torch.ones(2, 24, 1, dtype=torch.long),
    },
    "instructblip": _question,
    "kosmos-2": _kosmos,
    "kyutai_speech_to_text": lambda model: {"input_ids": _tokens(2, 24, model.config.num_codebooks + 1)},
    "patchtst": lambda model: {
        "past_values": _noise(2, model.config.context_length, model.config.num_input_channels)
    },
    "pix2struct": lambda model: {
        "flattened_patches": torch.cat([torch.ones(2, 16, 2), _noise(2, 16, 768)], dim=-1),
        "decoder_input_ids": _tokens(2, 10),
    },
    "siglip2_vision_model": _navit,
    "siglip2": lambda model: {"input_ids": _tokens(2, 24), **_navit(model)},
    "timesfm2_5": lambda model: {"past_values": _noise(2, 64)},
    "timesfm": lambda model: {
        "past_values": _noise(2, 64),
        "past_values_padding": torch.zeros(2, 64),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "voxtral_realtime": lambda model: {"input_ids": _tokens(2, 20), "input_features": _noise(2, 16, 160)},
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        lambda model: {"input_ids": _tokens(2, 24), "decoder_input_ids": _tokens(8, 10)},
    ),
    **dict.fromkeys(("informer", "time_series_transformer"), _series),
    **dict.fromkeys(("owlvit", "owlv2"), _queries),
}


def _tiles(model: Any) -> dict[str, Any]:
    """Returns text that looks at an image in tiles through cross-attention."""
    tiles, size = model.config.vision_config.max_num_tiles, model.config.vision_config.image_size
    return {
        "input_ids": _tokens(2, 24),
        "pixel_values": _noise(2, 1, tiles, 3, size, size),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 24, 1, tiles, dtype=torch.long),
    }


# Inputs with images of models that take others than models of their kind.
IMAGES: dict[str, Callable[[Any], dict[str, Any]]] = {"gemma4": _pooled, "mllama": _tiles}
