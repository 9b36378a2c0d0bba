"""Norms of flash-linear-attention's layers that are gated, in PyTorch, with its signatures; see `norms`.

`rms_norm_gated` is `subquad.ops`'.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from ..ops.gated_norm import rms_norm_gated
from .norms import Normed, affine, projected, summed, widened

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def _gated(x: Tensor, gate: Tensor, activation: str) -> Tensor:
    """Returns wide rows times the activation of their gates.

    Raises:
        ValueError: for activations other than `swish`, `silu` and `sigmoid`.
    """
    wide = widened(gate).reshape(x.shape)
    if activation in {"swish", "silu"}:
        return x * silu(wide)
    if activation == "sigmoid":
        return x * wide.sigmoid()
    raise ValueError(f"activation: expected 'swish', 'silu' or 'sigmoid', got {activation!r}")


def _norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    prenorm: bool,
    residual_in_fp32: bool,
    eps: float,
    linear: tuple[Tensor, Tensor | None] | None = None,
) -> Normed:
    wide, total = summed(x, residual, in_fp32=residual_in_fp32)
    normed = _gated(affine(wide, weight, bias, eps=eps, rms=False), g, activation).to(x.dtype)
    if linear is not None:
        normed = projected(normed, *linear)
    return (normed, total) if prenorm else normed


def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """Computes the layer norm of `x + residual`, times `activation(g)`.

    Args:
        x: `[..., C]`.
        g: gates, as many as `x` has elements.
        weight: `[C]`.
        bias: `[C]`.
        activation: `swish`, `silu` or `sigmoid`.
        residual: as `x`.
        prenorm: whether to return the sum as well.
        residual_in_fp32: whether that is float32 where there is no residual.
        eps: is added to the mean of squares.

    Returns:
        As `x`, and with `prenorm` the sum, in the dtype of the residual.

    Raises:
        ValueError: for other activations, and shapes that do not fit.
    """
    return _norm_gated(
        x,
        g,
        weight,
        bias,
        residual,
        activation=activation,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        eps=eps,
    )


def layer_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """Computes `linear(layer_norm_gated(x, g))` with the weights `[D, C]` and `[D]`; returns `[..., D]`, and the sum."""
    return _norm_gated(
        x,
        g,
        norm_weight,
        norm_bias,
        residual,
        activation="swish",
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        eps=eps,
        linear=(linear_weight, linear_bias),
    )


def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """Computes `layer_norm_swish_gate_linear` with means as they are."""
    result = rms_norm_gated(x, g, norm_weight, norm_bias, "swish", residual, prenorm, residual_in_fp32, eps)
    if not prenorm:
        return projected(result, linear_weight, linear_bias)
    normed, total = result
    return projected(normed, linear_weight, linear_bias), total


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Computes the norm of `x` in groups, times `silu(z)` before or after.

    Args:
        x: `[..., C]`.
        weight: `[C]`.
        bias: `[C]`.
        z: gates, as `x`.
        eps: is added to the mean of squares.
        group_size: how many channels share a norm; `None`: all.
        norm_before_gate: whether the gate is of the result instead of `x`.
        is_rms_norm: whether means are left as they are.

    Returns:
        As `x`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    channels = x.shape[-1]
    if group_size is not None and (group_size < 1 or channels % group_size):
        raise ValueError(f"group_size: expected a divisor of {channels}, got {group_size}")
    groups = 1 if group_size is None else channels // group_size
    wide = widened(x)
    if z is not None and not norm_before_gate:
        wide = _gated(wide, z, "silu")
    normed = affine(wide, weight, bias, eps=eps, rms=is_rms_norm, groups=groups)
    if z is not None and norm_before_gate:
        normed = _gated(normed, z, "silu")
    return normed.to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Computes `layernorm_fn` with means as they are."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)
