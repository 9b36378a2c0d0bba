"""What flash-linear-attention's layers call besides operators: its functions' names, where they are, and ours."""

from __future__ import annotations

from .. import ops
from ..ops.gated_norm import rms_norm_gated
from .activations import (
    bias_gelu_impl,
    fast_gelu_impl,
    logsigmoid,
    logsigmoid_bwd,
    logsigmoid_fwd,
    powglu,
    powglu_linear,
    sigmoid,
    sigmoid_bwd,
    sigmoid_fwd,
    sigmoidglu,
    sigmoidglu_linear,
    sqrelu,
    swiglu,
    swiglu_linear,
    swish,
    swish_bwd,
    swish_fwd,
)
from .convolution import causal_conv1d_update
from .dispatch import Function
from .gated_norms import (
    layer_norm_gated,
    layer_norm_swish_gate_linear,
    layernorm_fn,
    rms_norm_swish_gate_linear,
    rmsnorm_fn,
)
from .norms import (
    group_norm,
    group_norm_linear,
    l2norm,
    layer_norm,
    layer_norm_linear,
    rms_norm,
    rms_norm_linear,
)
from .positions import rotary_embedding, token_shift
from .rwkv7 import (
    fused_addcmul_rwkv7,
    fused_k_rwkv7,
    fused_mul_recurrent_rwkv7,
    gate_output_correction,
)


def _by_name(*functions: Function) -> dict[str, Function]:
    return {function.__name__: function for function in functions}


# Modules of recent versions come first.
FUNCTIONS: tuple[tuple[tuple[str, ...], dict[str, Function]], ...] = (
    (
        ("fla.modules.norm.layernorm", "fla.modules.layernorm"),
        _by_name(
            layer_norm,
            group_norm,
            rms_norm,
            layer_norm_linear,
            group_norm_linear,
            rms_norm_linear,
        ),
    ),
    (
        ("fla.modules.norm.fused_norm_gate", "fla.modules.fused_norm_gate"),
        _by_name(
            layer_norm_gated,
            rms_norm_gated,
            layer_norm_swish_gate_linear,
            rms_norm_swish_gate_linear,
        ),
    ),
    (
        ("fla.modules.norm.layernorm_gated", "fla.modules.layernorm_gated"),
        _by_name(layernorm_fn, rmsnorm_fn),
    ),
    (("fla.modules.norm.l2norm", "fla.modules.l2norm"), _by_name(l2norm)),
    (
        ("fla.modules.activations",),
        _by_name(
            sigmoid,
            logsigmoid,
            swish,
            sqrelu,
            fast_gelu_impl,
            bias_gelu_impl,
            swiglu,
            swiglu_linear,
            sigmoidglu,
            sigmoidglu_linear,
            powglu,
            powglu_linear,
        ),
    ),
    (
        ("fla.modules.activations.ops", "fla.modules.activations"),
        _by_name(sigmoid_fwd, sigmoid_bwd, logsigmoid_fwd, logsigmoid_bwd, swish_fwd, swish_bwd),
    ),
    (
        ("fla.modules.causal_conv1d", "fla.modules.convolution"),
        _by_name(ops.causal_conv1d, causal_conv1d_update),
    ),
    (("fla.modules.rotary",), _by_name(rotary_embedding)),
    (("fla.modules.token_shift",), _by_name(token_shift)),
    (("fla.ops.rwkv7",), _by_name(fused_mul_recurrent_rwkv7)),
    (("fla.ops.rwkv7.fused_addcmul",), _by_name(fused_addcmul_rwkv7)),
    (("fla.ops.rwkv7.fused_k_update",), _by_name(fused_k_rwkv7)),
    (("fla.ops.rwkv7.gate_output_correction",), _by_name(gate_output_correction)),
)
