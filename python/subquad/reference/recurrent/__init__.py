"""Oracles of recurrences: one token after the other, in the words of their equations.

They have the names and the order of arguments of flash-linear-attention, mamba_ssm and causal_conv1d, without what does not change
results (chunk sizes, checkpoints, whether states are returned: they always are).
"""

from .convolution import causal_conv1d_fn, causal_conv1d_update
from .decayed import gateloop, gla, hgrn, lightning_attn, linear_attn, retention, rwkv6, simple_gla
from .delta import (
    delta_rule,
    dplr_delta_rule,
    gated_delta_product,
    gated_delta_rule,
    iplr_delta_rule,
    kda,
    rwkv7,
)
from .gates import gdn_gate, kda_gate
from .mlstm import mlstm, mlstm_sigmoid
from .norms import rms_norm_gated
from .slots import gsa
from .state_space import mamba_chunk_scan_combined, selective_scan_fn, selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "delta_rule",
    "dplr_delta_rule",
    "gated_delta_product",
    "gated_delta_rule",
    "gateloop",
    "gdn_gate",
    "gla",
    "gsa",
    "hgrn",
    "iplr_delta_rule",
    "kda",
    "kda_gate",
    "lightning_attn",
    "linear_attn",
    "mamba_chunk_scan_combined",
    "mlstm",
    "mlstm_sigmoid",
    "retention",
    "rms_norm_gated",
    "rwkv6",
    "rwkv7",
    "selective_scan_fn",
    "selective_state_update",
    "simple_gla",
]
