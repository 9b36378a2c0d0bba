"""The functions that transformers computes recurrent layers with on a CPU, and subquad's operators in their place.

Every model file of transformers has copies of them, with the same names, arguments and results: loops and products of PyTorch that
stand in for packages that need a GPU. What they compute, in which layout, is that package's function::

    torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule       flash-linear-attention
    chunk_kimi_delta_attention, recurrent_kimi_delta_attention           flash-linear-attention
    mamba2_chunk_scan, mamba2_selective_state_update                     mamba_ssm
    mamba_selective_scan, mamba_selective_state_update                   mamba_ssm
    causal_conv1d_fn, causal_conv1d_update                               causal-conv1d

`rwkv_linear_attention` is RWKV-4's, which has a kernel of its own on a GPU.

Sums and states are float32 there whatever the dtype of the model, and here too, except that float64 models are computed in float64;
results have the dtypes that the functions give them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from subquad import ops
from subquad.hf.recurrent_arguments import (
    Running,
    beside,
    common_dtype,
    inputs_of,
    needs_grad,
    parameter_names,
    parameters_of,
    rows,
    why_refused,
    wide,
)
from subquad.hf.wkv import wkv

# The parameters are named as transformers names them.
# ruff: noqa: FBT001, FBT002

_MAX_HEAD_DIM = 1024
_ACTIVATIONS = (None, "silu", "swish")
# Operators of single steps write to states, and have none.
_STEP_GRADIENTS = "gradients of a step"

# Takes what runs and the arguments by name. A result is that of the function, or the reason why it has to compute the call itself.
Compute = Callable[..., Any]


@dataclass(frozen=True)
class Fallback:
    """A function of transformers that subquad has an operator for.

    Attributes:
        names: What it is called.
        parameters: The names of its parameters, apart from `**kwargs`.
        operator: The operator, of `subquad.ops`.
        compute: Computes a call.
        continues: Whether the operator starts from a cached state where the function starts from zeros.
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    operator: str
    compute: Compute
    continues: bool = False

    def describes(self, function: Any) -> bool:
        """Whether a function has these parameters."""
        return parameter_names(function) == self.parameters


def _delta_rule(operator: str, *, in_place: bool) -> Compute:
    """Returns what computes a gated delta rule, with gates of steps or of channels.

    Args:
        operator: The name of the operator.
        in_place: Whether it can write the final state where the initial one is. The caller copies the final state there next.
    """

    def compute(
        running: Running,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | str:
        del running
        reason = why_refused(others, query, key, value, g, beta, initial_state)
        if reason is None and max(key.shape[3], value.shape[3]) > _MAX_HEAD_DIM:
            reason = f"head_dim above {_MAX_HEAD_DIM}"
        if reason is not None:
            return reason
        dtype = common_dtype(query, key, value)
        initial = None if initial_state is None else initial_state.to(wide(dtype))
        options: dict[str, Any] = {}
        if in_place and output_final_state and initial is not None and initial.is_contiguous():
            options["inplace_final_state"] = not needs_grad(query, key, value, g, beta, initial)
        output, final = getattr(ops, operator)(
            *(rows(one.to(dtype)) for one in (query, key, value)),
            g=rows(beside(g, dtype)),
            beta=rows(beside(beta, dtype)),
            initial_state=initial,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **options,
        )
        return output.to(query.dtype), None if final is None else final.to(torch.float32)

    return compute


def _refused_convolution(
    weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> str | None:
    if activation not in _ACTIVATIONS:
        return f"convolution with activation {activation}"
    return (
        "bias of another dtype than the weight" if bias is not None and bias.dtype != weight.dtype else None
    )


def _convolution(
    running: Running,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor | str:
    del running
    reason = why_refused(others, hidden_states, weight, bias) or _refused_convolution(
        weight, bias, activation
    )
    if reason is not None:
        return reason
    output: torch.Tensor = ops.causal_conv1d_fn(
        hidden_states.to(weight.dtype), weight, bias, activation=activation
    )
    return output.to(hidden_states.dtype)


def _convolution_step(
    running: Running,
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor | str:
    del running
    reason = why_refused(others, hidden_states, conv_state, weight, bias)
    reason = reason or _refused_convolution(weight, bias, activation)
    if reason is None and needs_grad(hidden_states, conv_state, weight, bias):
        reason = _STEP_GRADIENTS
    if reason is not None:
        return reason
    past = conv_state.to(weight.dtype)
    output: torch.Tensor = ops.causal_conv1d_update(
        hidden_states.to(weight.dtype), past, weight, bias, activation=activation
    )
    if past is not conv_state:
        conv_state.copy_(past)
    return output.to(hidden_states.dtype)


def _silu_convolution_step(
    running: Running,
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor | str:
    """Computes `torch_causal_conv1d_update`, which takes no notice of its `activation`."""
    del activation
    return _convolution_step(running, hidden_states, conv_state, weight, bias, "silu", **others)


def _mamba2_scan(
    running: Running,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | str:
    del running
    reason = why_refused(others, hidden_states, dt, A, B, C, D, dt_bias, initial_states)
    if reason is not None:
        return reason
    dtype = common_dtype(hidden_states, B, C)
    result = ops.mamba_chunk_scan_combined(
        **inputs_of(dtype, x=rows(hidden_states), B=rows(B), C=rows(C)),
        **parameters_of(dtype, dt=rows(dt), A=A, D=D, dt_bias=dt_bias),
        chunk_size=chunk_size,
        initial_states=None if initial_states is None else initial_states.to(wide(dtype)),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    if isinstance(result, tuple):
        output, final = result
        return output.float(), final.float()
    alone: torch.Tensor = result.float()
    return alone


def _state_update(
    running: Running,
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_softplus: bool = False,
    **others: Any,
) -> torch.Tensor | str:
    del running
    reason = why_refused(others, state, hidden_states, dt, A, B, C, D, dt_bias, z)
    if reason is None and needs_grad(state, hidden_states, dt, A, B, C, D, dt_bias, z):
        reason = _STEP_GRADIENTS
    if reason is not None:
        return reason
    dtype = common_dtype(hidden_states, dt, B, C)
    kept = state.to(wide(dtype))
    output: torch.Tensor = ops.selective_state_update(
        kept,
        **inputs_of(dtype, x=hidden_states, dt=dt, B=B, C=C, z=z),
        **parameters_of(dtype, A=A, D=D, dt_bias=dt_bias),
        dt_softplus=dt_softplus,
    )
    if kept is not state:
        state.copy_(kept)
    return output.to(hidden_states.dtype)


def _mamba_scan(
    running: Running,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | str:
    head, running.scans = running.scans, running.scans + 1
    reason = why_refused(others, hidden_states, dt, A, B, C, D, z, delta_bias)
    if reason is not None:
        return reason
    dtype = common_dtype(hidden_states, dt, B, C)
    initial = running.cached_state() if return_last_state else None
    if initial is not None:
        # Models with several heads scan one after the other.
        initial = (initial if initial.ndim == A.ndim + 1 else initial[:, head]).to(wide(dtype))
    result = ops.selective_scan_fn(
        **inputs_of(dtype, u=hidden_states, delta=dt, B=B, C=C, z=z),
        **parameters_of(dtype, A=A, D=D, delta_bias=delta_bias),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
        initial_state=initial,
    )
    # Of the skip connection and the gate.
    promoted = common_dtype(hidden_states, D, z)
    if return_last_state:
        output, last = result
        return output.to(promoted), last
    return result.to(promoted)  # type: ignore[no-any-return]


_DELTA = ("query", "key", "value", "g", "beta")
_DELTA_OPTIONS = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
_SCAN = ("hidden_states", "dt", "A", "B", "C")
_CONVOLUTION = ("weight", "bias", "activation")

_KNOWN = (
    Fallback(
        ("torch_chunk_gated_delta_rule",),
        (*_DELTA, "chunk_size", *_DELTA_OPTIONS),
        "chunk_gated_delta_rule",
        _delta_rule("chunk_gated_delta_rule", in_place=False),
    ),
    Fallback(
        ("torch_recurrent_gated_delta_rule",),
        (*_DELTA, *_DELTA_OPTIONS),
        "fused_recurrent_gated_delta_rule",
        _delta_rule("fused_recurrent_gated_delta_rule", in_place=True),
    ),
    Fallback(
        ("chunk_kimi_delta_attention",),
        (*_DELTA, "chunk_size", *_DELTA_OPTIONS),
        "chunk_kda",
        _delta_rule("chunk_kda", in_place=False),
    ),
    Fallback(
        ("recurrent_kimi_delta_attention",),
        (*_DELTA, *_DELTA_OPTIONS),
        "fused_recurrent_kda",
        _delta_rule("fused_recurrent_kda", in_place=True),
    ),
    Fallback(
        ("mamba2_chunk_scan",),
        (
            *_SCAN,
            "chunk_size",
            "D",
            "dt_bias",
            "initial_states",
            "dt_softplus",
            "dt_limit",
            "return_final_states",
        ),
        "mamba_chunk_scan_combined",
        _mamba2_scan,
    ),
    Fallback(
        ("mamba2_selective_state_update", "mamba_selective_state_update"),
        ("state", *_SCAN, "D", "dt_bias", "dt_softplus", "z"),
        "selective_state_update",
        _state_update,
    ),
    Fallback(
        ("mamba_selective_scan",),
        (
            *_SCAN,
            "D",
            "z",
            "delta_bias",
            "delta_softplus",
            "return_last_state",
            "use_mambapy",
            "use_associative_scan",
        ),
        "selective_scan_fn",
        _mamba_scan,
        continues=True,
    ),
    Fallback(
        ("rwkv_linear_attention",),
        ("time_decay", "time_first", "key", "value", "state", "return_state"),
        "fused_recurrent_hgrn",
        wkv,
    ),
    Fallback(("causal_conv1d_fn",), ("hidden_states", *_CONVOLUTION), "causal_conv1d_fn", _convolution),
    Fallback(
        ("causal_conv1d_update",),
        ("hidden_states", "conv_state", *_CONVOLUTION),
        "causal_conv1d_update",
        _convolution_step,
    ),
    Fallback(
        ("torch_causal_conv1d_update",),
        ("hidden_states", "conv_state", *_CONVOLUTION),
        "causal_conv1d_update",
        _silu_convolution_step,
    ),
)
FALLBACKS = {name: one for one in _KNOWN for name in one.names}
