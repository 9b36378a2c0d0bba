"""Where flash-linear-attention has the operators of `subquad.ops`."""

from __future__ import annotations

from collections.abc import Mapping

ROOT = "fla.ops"
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "fla.ops.abc": ("chunk_abc",),
    "fla.ops.delta_rule": ("chunk_delta_rule", "fused_recurrent_delta_rule"),
    "fla.ops.delta_rule.parallel": ("parallel_delta_rule",),
    "fla.ops.gated_delta_product": ("chunk_gated_delta_product",),
    "fla.ops.gated_delta_rule": (
        "chunk_gated_delta_rule",
        "chunk_gdn",
        "fused_recurrent_gated_delta_rule",
        "fused_recurrent_gdn",
    ),
    "fla.ops.gated_delta_rule.gate": ("fused_gdn_gate",),
    "fla.ops.generalized_delta_rule": (
        "chunk_dplr_delta_rule",
        "chunk_iplr_delta_rule",
        "fused_recurrent_dplr_delta_rule",
        "fused_recurrent_iplr_delta_rule",
    ),
    "fla.ops.gla": ("chunk_gla", "fused_recurrent_gla"),
    "fla.ops.gsa": ("chunk_gsa", "fused_recurrent_gsa"),
    "fla.ops.gsa.gate": ("fused_additive_gate",),
    "fla.ops.hgrn": ("chunk_hgrn", "fused_recurrent_hgrn"),
    "fla.ops.kda": ("chunk_kda", "fused_recurrent_kda"),
    "fla.ops.kda.gate": ("fused_kda_gate",),
    "fla.ops.lightnet": ("chunk_lightnet", "fused_recurrent_lightnet"),
    "fla.ops.lightning_attn": ("chunk_lightning_attn", "fused_recurrent_lightning_attn"),
    "fla.ops.linear_attn": ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"),
    "fla.ops.retention": (
        "chunk_retention",
        "fused_chunk_retention",
        "fused_recurrent_retention",
        "parallel_retention",
    ),
    "fla.ops.rwkv6": ("chunk_rwkv6", "fused_recurrent_rwkv6"),
    "fla.ops.rwkv7": ("chunk_rwkv7", "fused_recurrent_rwkv7"),
    "fla.ops.simple_gla": (
        "chunk_simple_gla",
        "fused_chunk_simple_gla",
        "fused_recurrent_simple_gla",
        "parallel_simple_gla",
    ),
}


def exported() -> tuple[str, ...]:
    """Returns the operators that `fla.ops` has as well: those of families, but not those of modules in them."""
    depth = ROOT.count(".") + 1
    return tuple(name for module, names in FAMILIES.items() if module.count(".") == depth for name in names)
