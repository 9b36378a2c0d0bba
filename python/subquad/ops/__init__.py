"""Operators, on PyTorch tensors, NumPy arrays and other DLPack arrays alike.

What is named here are the recurrent operators, which `subquad.ops.recurrent` describes, and the short convolutions before them, of
which `subquad.ops.convolution` tells, and the gated norm behind them, `rms_norm_gated`; they are imported when they are first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convolution import causal_conv1d, causal_conv1d_fn, causal_conv1d_update
    from .delta_rule import chunk_delta_rule, fused_recurrent_delta_rule, parallel_delta_rule
    from .gate_loop import chunk_gate_loop, fused_recurrent_gate_loop
    from .gated_delta_product import chunk_gated_delta_product
    from .gated_delta_rule import (
        chunk_gated_delta_rule,
        chunk_gdn,
        fused_recurrent_gated_delta_rule,
        fused_recurrent_gdn,
    )
    from .gated_norm import rms_norm_gated
    from .gates import fused_gdn_gate, fused_kda_gate
    from .generalized_delta_rule import (
        chunk_dplr_delta_rule,
        chunk_iplr_delta_rule,
        fused_recurrent_dplr_delta_rule,
        fused_recurrent_iplr_delta_rule,
    )
    from .gla import chunk_gla, fused_recurrent_gla
    from .gsa import chunk_gsa, fused_recurrent_gsa
    from .hgrn import chunk_hgrn, fused_recurrent_hgrn
    from .kda import chunk_kda, fused_recurrent_kda
    from .lightning_attn import chunk_lightning_attn, fused_recurrent_lightning_attn
    from .linear_attn import chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn
    from .mamba2 import mamba_chunk_scan_combined
    from .mlstm import mlstm_chunkwise, mlstm_recurrent, mlstm_siging_chunkwise, mlstm_siging_recurrent
    from .retention import (
        chunk_retention,
        fused_chunk_retention,
        fused_recurrent_retention,
        parallel_retention,
    )
    from .rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
    from .rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7
    from .selective_scan import selective_scan_fn, selective_state_update
    from .simple_gla import (
        chunk_simple_gla,
        fused_chunk_simple_gla,
        fused_recurrent_simple_gla,
        parallel_simple_gla,
    )

__all__ = [
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gate_loop",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_gsa",
    "chunk_hgrn",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_gdn_gate",
    "fused_kda_gate",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gate_loop",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "mamba_chunk_scan_combined",
    "mlstm_chunkwise",
    "mlstm_recurrent",
    "mlstm_siging_chunkwise",
    "mlstm_siging_recurrent",
    "parallel_delta_rule",
    "parallel_retention",
    "parallel_simple_gla",
    "rms_norm_gated",
    "selective_scan_fn",
    "selective_state_update",
]

# Where they are defined.
_FAMILIES = (
    "convolution",
    "delta_rule",
    "gate_loop",
    "gated_delta_product",
    "gated_delta_rule",
    "gated_norm",
    "gates",
    "generalized_delta_rule",
    "gla",
    "gsa",
    "hgrn",
    "kda",
    "lightning_attn",
    "linear_attn",
    "mamba2",
    "mlstm",
    "retention",
    "rwkv6",
    "rwkv7",
    "selective_scan",
    "simple_gla",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for family in _FAMILIES:
            defined = vars(_import_module(f".{family}", __name__))
            if name in defined:
                # The next look-up finds it at once.
                return globals().setdefault(name, defined[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
