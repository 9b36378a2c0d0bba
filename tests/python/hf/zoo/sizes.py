"""Tiny configurations, made from the defaults of a configuration class by the names of its fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .exceptions import SIZES, Part

VOCABULARY = 128
# Text is drawn from these. What lies below are the padding and the ends, what lies above stands for images and
# the like.
FIRST_TOKEN, LAST_TOKEN = 4, 99
HIDDEN = 64
HEADS = 4
WINDOW = 8
_MAX_LAYERS = 6

_HEAD_COUNTS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "swa_num_attention_heads"),
    *("encoder_attention_heads", "decoder_attention_heads", "encoder_num_attention_heads"),
    *("decoder_num_attention_heads", "linear_num_value_heads", "linear_num_heads"),
)
_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"),
)
_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "out_hidden_size", "hidden_dim"),
    *("decoder_hidden_size", "encoder_hidden_size", "text_hidden_size", "embedding_size", "text_embed_dim"),
    *("vision_embed_dim", "output_hidden_size", "encoder_hidden_dim", "projection_dim", "output_dim"),
    *("cross_hidden_size", "condition_dim", "audio_hidden_size", "adapter_in_dim", "adapter_input_size"),
    "mit_hidden_size",
)
_INNER_WIDTHS = (
    *("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "mlp_dim"),
    *("shared_intermediate_size", "decoder_intermediate_size", "projector_hidden_size", "dense_ffn_dim"),
)
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_STAGES = ("depths", "blocks_per_stage", "embed_dim_per_stage")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions")

# The new value of a field whose default is an integer, by the field's name.
_VALUES: dict[str, int] = {
    **dict.fromkeys(_HEAD_COUNTS, HEADS),
    **dict.fromkeys(_LAYER_COUNTS, 2),
    **dict.fromkeys(_WIDTHS, HIDDEN),
    **dict.fromkeys(_INNER_WIDTHS, 96),
    **dict.fromkeys(_EXPERT_WIDTHS, 32),
    **dict.fromkeys(_EXPERT_COUNTS, 4),
    **dict.fromkeys(_CHOSEN_EXPERTS, 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "swa_head_dim", "local_attention"), 16),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "mamba_d_head", "mamba_d_state"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts", "decoder_sparse_step"), 1),
    **dict.fromkeys(("max_window_layers",), 1),
    "v_head_dim": 12,
    # Gives another scale than the head dimension.
    "query_pre_attn_scalar": 12,
    "index_n_heads": 2,
    "index_topk": 4,
    "mamba_chunk_size": 8,
    "mamba_n_heads": 8,
    "output_channels": HIDDEN,
    "fpn_hidden_size": HIDDEN,
    "crop_size": 32,
    "frames_per_clip": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "num_mel_bins": 16,
    "num_queries": 10,
    "mm_tokens_per_image": 4,
    "upsample_groups": HIDDEN,
}  # fmt: skip
# Where the class declares `None`, these follow from others.
_DERIVED = ("head_dim", "num_key_value_heads", "n_inner", "intermediate_size")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 3}


@dataclass(frozen=True)
class _Layers:
    """Which layers are kept.

    Attributes:
        lists: The fields that list something for every layer, as they were.
        chosen: The layers that are kept; empty if any two will do.
        levels: What a backbone gives, counted from one; empty if it gives the last layer only.
        in_stages: Whether the layers are in stages of different widths, which are kept.
    """

    lists: dict[str, list[Any]]
    chosen: list[int]
    levels: list[int]
    in_stages: bool


def _count_layers(default: PreTrainedConfig) -> int:
    values = (default.__dict__.get(name) for name in _LAYER_COUNTS)
    return next((one for one in values if isinstance(one, int)), 0)


def _choose(lists: dict[str, list[Any]], layers: int) -> list[int]:
    """Returns the first layer of each kind, and two at least."""
    seen: dict[str, int] = {}
    for index in range(layers):
        kind = repr([values[index] for values in lists.values() if not isinstance(values[index], float)])
        seen.setdefault(kind, index)
    chosen = sorted(seen.values())[:_MAX_LAYERS]
    return chosen if len(chosen) > 1 else [*chosen, *(i for i in range(layers) if i not in chosen)][:2]


def _layers(default: PreTrainedConfig) -> _Layers:
    values, layers = default.__dict__, _count_layers(default)
    in_stages = any(isinstance(values.get(name), list | tuple) for name in _STAGES)
    lists = {}
    for one in fields(default):
        value = values.get(one.name)
        if isinstance(value, list | tuple) and len(value) == layers > _MAX_LAYERS:
            lists[one.name] = list(value)
    levels = values.get("_out_indices") or ()
    if 1 < len(levels) < layers and not in_stages:
        return _Layers(lists, list(range(len(levels))), list(range(1, len(levels) + 1)), in_stages)
    return _Layers(lists, _choose(lists, layers) if lists else [], [], in_stages)


def _number(name: str, value: int, default: PreTrainedConfig, layers: _Layers) -> int | None:
    """Returns the new value of a number; `None` if it stays."""
    if layers.in_stages and (name in _WIDTHS or name in ("image_size", "patch_size")):
        return None
    if name in _LAYER_COUNTS and layers.chosen:
        return len(layers.chosen)
    if name in _POSITIONS:
        # Without learned positions this is a limit, of which scaled rotary embeddings make something.
        return None if "rope_parameters" in default.__dict__ else min(value, 512)
    if name == "num_key_value_heads" and value == default.__dict__.get("num_attention_heads"):
        return HEADS
    return min(value, _VALUES[name]) if value > 0 and name in _VALUES else None


def _token(name: str, value: Any, tokens: dict[str, int]) -> Any:
    if value is None and name != "pad_token_id":
        return None
    token = _SPECIAL.get(name)
    if token is None:
        # The same field of the whole and of its parts has to mean the same token.
        token = tokens.setdefault(name, LAST_TOKEN + 1 + len(tokens))
    return [token] if isinstance(value, list | tuple) else token


def _field(name: str, value: Any, default: PreTrainedConfig, layers: _Layers, tokens: dict[str, int]) -> Any:
    """Returns the new value of a field; `None` if it stays."""
    new: Any = None
    if isinstance(value, PreTrainedConfig):
        new = tiny(value, tokens)
    elif name in layers.lists:
        new = [layers.lists[name][index] for index in layers.chosen]
    elif name.endswith(("_token_id", "_token_index")):
        new = _token(name, value, tokens)
    elif name == "vocab_size" or (name == "head_dim" and value is None):
        new = _VALUES[name]
    elif name == "image_size" and isinstance(value, list | tuple):
        new = [_VALUES[name]] * 2
    elif name == "depths" and isinstance(value, list | tuple):
        new = [1] * len(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        new = _number(name, value, default, layers)
    return new


def _shrink(default: PreTrainedConfig, tokens: dict[str, int]) -> dict[str, Any]:
    layers, fresh = _layers(default), type(default)()
    values: dict[str, Any] = {"out_indices": layers.levels} if layers.levels else {}
    known = {one.name: one.default for one in fields(default)}
    for name, declared in known.items():
        value = default.__dict__.get(name)
        if name in PreTrainedConfig.__dataclass_fields__:
            continue
        if declared is None and value is not None and name in _DERIVED:
            continue
        new = _field(name, value, default, layers, tokens)
        if new is not None:
            values[name] = new
        elif value != fresh.__dict__.get(name):
            # Parts of a whole have defaults of their own.
            values[name] = value
    if layers.in_stages and (given := default.__dict__.get("_out_features")):
        values["out_features"] = given
    if "use_sliding_window" in known:
        values |= {"use_sliding_window": True, "sliding_window": WINDOW}
        values.pop("layer_types", None)
    if "tie_word_embeddings" in known:
        # Tied random embeddings would mostly repeat the last token.
        values["tie_word_embeddings"] = False
    return values


def _fit_rope(values: dict[str, Any], default: PreTrainedConfig) -> None:
    """Lets the axes of a rotary embedding share the new head dimension."""
    rope = default.__dict__.get("rope_parameters")
    if "mrope_section" not in getattr(default, "ignore_keys_at_rope_validation", ()) or rope is None:
        return
    if "head_dim" in values:
        # A quarter of it may be rotated, and is shared by three axes.
        values["head_dim"] = 32
    width = values.get("qk_rope_head_dim") or values.get("head_dim") or HIDDEN // HEADS

    def fitted(given: dict[str, Any]) -> dict[str, Any]:
        half = int(width * (given.get("partial_rotary_factor") or 1.0)) // 2
        return {**given, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}

    # Models with several kinds of layers have one for each.
    if rope and all(isinstance(one, dict) for one in rope.values()):
        values["rope_parameters"] = {kind: fitted(one) for kind, one in rope.items()}
    elif rope:
        values["rope_parameters"] = fitted(rope)


def tiny(default: PreTrainedConfig, tokens: dict[str, int] | None = None) -> PreTrainedConfig:
    """Returns a small configuration of the same class.

    Args:
        default: What the class gives without arguments.
        tokens: Special tokens that are already given out.
    """
    tokens = {} if tokens is None else tokens
    values = _shrink(default, tokens)
    _fit_rope(values, default)
    for name, value in SIZES.get(default.model_type, {}).items():
        values[name] = tiny(CONFIG_MAPPING[value.kind](), tokens) if isinstance(value, Part) else value
    return type(default)(**values)


def tiny_config(kind: str) -> PreTrainedConfig:
    """Returns a small configuration of a model type."""
    return tiny(CONFIG_MAPPING[kind]())
