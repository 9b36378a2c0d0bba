"""The functions that transformers computes recurrent layers with on a CPU, and subquad's operators in their place.

Every model file of transformers has copies of them, with the same names, arguments and results: loops and products of PyTorch that
stand in for packages that need a GPU. What they compute, in which layout, is that package's function::

    torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule       flash-linear-attention
    chunk_kimi_delta_attention, recurrent_kimi_delta_attention           flash-linear-attention
    mamba2_chunk_scan, mamba2_selective_state_update                     mamba_ssm
    mamba_selective_scan, mamba_selective_state_update                   mamba_ssm
    causal_conv1d_fn, causal_conv1d_update                               causal-conv1d

Sums and states are float32 there whatever the dtype of the model, and here too, except that float64 models are computed in float64;
results have the dtypes that the functions give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch

from subquad import ops
from subquad.hf.tracing import is_tracing, why_unreadable

# The parameters are named as transformers names them.
# ruff: noqa: FBT001, FBT002

Tensor = TypeVar("Tensor", torch.Tensor, torch.Tensor | None)

_MAX_HEAD_DIM = 1024
# How callers say that tokens of one row are of several sequences.
_PACKED = ("cu_seqlens", "cu_seq_lens_q", "seq_idx")
_ACTIVATIONS = (None, "silu", "swish")


@dataclass
class Running:
    """A module of a patched model while its `forward` runs.

    Attributes:
        module: The module.
        inputs: What `forward` was called with.
        scans: How many sequences of several tokens it has scanned so far: one for each head, in some models.
    """

    module: Any
    inputs: tuple[Any, ...] = field(repr=False)
    scans: int = 0

    def cached_state(self) -> torch.Tensor | None:
        """Returns the state of the module's layer before this call, `None` where there is no cache or nothing in it."""
        cache = next((one for one in self.inputs if hasattr(one, "get_recurrent_state")), None)
        state: torch.Tensor | None = (
            None if cache is None else cache.get_recurrent_state(self.module.layer_idx)
        )
        return state


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
        try:
            found = signature(function).parameters.values()
        except (TypeError, ValueError):
            return False
        return tuple(one.name for one in found if one.kind is not Parameter.VAR_KEYWORD) == self.parameters


def _refused(others: Mapping[str, Any], *tensors: torch.Tensor | None) -> str | None:
    """Returns why a call has to stay where it is, whichever it is.

    Args:
        others: Arguments that the operator does not get.
        *tensors: Those that it does.
    """
    present = [one for one in tensors if one is not None]
    for one in present:
        reason = why_unreadable(one)
        if reason is not None:
            return reason
        if one.numel() == 0:
            return "empty tensors"
    if is_tracing(present[0]):
        return "tracing"
    # Most of the functions refuse them.
    return "packed sequences" if any(others.get(name) is not None for name in _PACKED) else None


def _common_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, (one.dtype for one in tensors if one is not None))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _beside(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gates and parameters in a dtype that operators take beside inputs of `dtype`."""
    if tensor is None or tensor.dtype in (dtype, _wide(dtype)):
        return tensor
    return tensor.to(_wide(dtype))


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


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
        reason = _refused(others, query, key, value, g, beta, initial_state)
        if reason is None and max(key.shape[3], value.shape[3]) > _MAX_HEAD_DIM:
            reason = f"head_dim above {_MAX_HEAD_DIM}"
        if reason is not None:
            return reason
        dtype = _common_dtype(query, key, value)
        initial = None if initial_state is None else initial_state.to(_wide(dtype))
        options: dict[str, Any] = {}
        if in_place and output_final_state and initial is not None and initial.is_contiguous():
            options["inplace_final_state"] = not _needs_grad(query, key, value, g, beta, initial)
        output, final = getattr(ops, operator)(
            *(_rows(one.to(dtype)) for one in (query, key, value)),
            g=_rows(_beside(g, dtype)),
            beta=_rows(_beside(beta, dtype)),
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
    reason = _refused(others, hidden_states, weight, bias) or _refused_convolution(weight, bias, activation)
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
    reason = _refused(others, hidden_states, conv_state, weight, bias)
    reason = reason or _refused_convolution(weight, bias, activation)
    if reason is not None:
        return reason
    past = conv_state.to(weight.dtype)
    output: torch.Tensor = ops.causal_conv1d_update(
        hidden_states.to(weight.dtype), past, weight, bias, activation=activation
    )
    if past is not conv_state:
        conv_state.copy_(past)
    return output.to(hidden_states.dtype)


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
    reason = _refused(others, hidden_states, dt, A, B, C, D, dt_bias, initial_states)
    if reason is not None:
        return reason
    dtype = _common_dtype(hidden_states, B, C)
    result = ops.mamba_chunk_scan_combined(
        _rows(hidden_states.to(dtype)),
        _rows(_beside(dt, dtype)),
        _beside(A, dtype),
        _rows(B.to(dtype)),
        _rows(C.to(dtype)),
        chunk_size,
        D=_beside(D, dtype),
        dt_bias=_beside(dt_bias, dtype),
        initial_states=None if initial_states is None else initial_states.to(_wide(dtype)),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    if return_final_states:
        output, final = result
        return output.float(), final.float()
    return result.float()  # type: ignore[no-any-return]


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
    reason = _refused(others, state, hidden_states, dt, A, B, C, D, dt_bias, z)
    dtype = _common_dtype(hidden_states, B, C)
    if reason is None and state.dtype != _wide(dtype):
        reason = f"state of dtype {str(state.dtype).removeprefix('torch.')}"
    if reason is not None:
        return reason
    output: torch.Tensor = ops.selective_state_update(
        state,
        hidden_states.to(dtype),
        _beside(dt, dtype),
        _beside(A, dtype),
        B.to(dtype),
        C.to(dtype),
        D=_beside(D, dtype),
        z=None if z is None else z.to(dtype),
        dt_bias=_beside(dt_bias, dtype),
        dt_softplus=dt_softplus,
    )
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
    reason = _refused(others, hidden_states, dt, A, B, C, D, z, delta_bias)
    if reason is not None:
        return reason
    dtype = _common_dtype(hidden_states, B, C)
    initial = running.cached_state() if return_last_state else None
    if initial is not None:
        # Models with several heads scan one after the other.
        initial = (initial if initial.ndim == A.ndim + 1 else initial[:, head]).to(_wide(dtype))
    result = ops.selective_scan_fn(
        hidden_states.to(dtype),
        _beside(dt, dtype),
        _beside(A, dtype),
        B.to(dtype),
        C.to(dtype),
        D=_beside(D, dtype),
        z=None if z is None else z.to(dtype),
        delta_bias=_beside(delta_bias, dtype),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
        initial_state=initial,
    )
    # Of the skip connection and the gate.
    promoted = _common_dtype(hidden_states, D, z)
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
    Fallback(("causal_conv1d_fn",), ("hidden_states", *_CONVOLUTION), "causal_conv1d_fn", _convolution),
    Fallback(
        # The second is what transformers called it while layers kept their functions.
        ("causal_conv1d_update", "torch_causal_conv1d_update"),
        ("hidden_states", "conv_state", *_CONVOLUTION),
        "causal_conv1d_update",
        _convolution_step,
    ),
)
FALLBACKS = {name: one for one in _KNOWN if one.operator in ops.__all__ for name in one.names}
