"""Norms of flash-linear-attention's layers, in PyTorch, with its signatures.

Sums are float32, float64 for float64 inputs, and results are rounded once, to the dtype of `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002

Normed = Tensor | tuple[Tensor, Tensor]


def widened(x: Tensor) -> Tensor:
    """Returns a tensor as it is computed with: float64 as it is, all others as float32."""
    return x if x.dtype == torch.float64 else x.float()


def affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, rms: bool, groups: int = 1
) -> Tensor:
    """Returns the norm of wide rows times `weight` plus `bias`, wide.

    Args:
        x: `[..., C]`, float32 or float64.
        weight: `[C]`.
        bias: `[C]`.
        eps: is added to the mean of squares.
        rms: whether means are left as they are.
        groups: how many parts of a row have norms of their own.

    Raises:
        ValueError: `C` is no multiple of `groups`.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"x: expected a last axis that {groups} groups divide, got {x.shape[-1]}")
    rows = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    if not rms:
        rows = rows - rows.mean(-1, keepdim=True)
    normed = (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        normed = normed * widened(weight)
    return normed if bias is None else normed + widened(bias)


def summed(x: Tensor, residual: Tensor | None, *, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Returns the sum with the residual, wide, and as the next layer gets it.

    Args:
        x: `[..., C]`.
        residual: as `x`; its dtype is the one of the sum.
        in_fp32: whether `x` is float32 for the next layer if there is no residual.

    Raises:
        ValueError: the shapes differ.
    """
    if residual is None:
        return widened(x), x.float() if in_fp32 else x
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {tuple(x.shape)} as x has, got {tuple(residual.shape)}")
    wide = widened(x) + widened(residual)
    return wide, wide.to(residual.dtype)


def projected(normed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns a linear map of what was normalised, with weights in its dtype."""
    return linear(normed, weight.to(normed.dtype), None if bias is None else bias.to(normed.dtype))


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Normed:
    """Computes the norm of `x + residual` in groups.

    Args:
        x: `[..., C]`.
        weight: `[C]`.
        bias: `[C]`.
        residual: as `x`.
        eps: is added to the mean of squares.
        prenorm: whether to return the sum as well.
        residual_in_fp32: whether that is float32 where there is no residual.
        is_rms_norm: whether means are left as they are.
        num_groups: how many parts of a row have norms of their own.

    Returns:
        The norm, as `x`, and with `prenorm` the sum, in the dtype of the residual.

    Raises:
        ValueError: for shapes that do not fit.
    """
    wide, total = summed(x, residual, in_fp32=residual_in_fp32)
    normed = affine(wide, weight, bias, eps=eps, rms=is_rms_norm, groups=num_groups).to(x.dtype)
    return (normed, total) if prenorm else normed


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Normed:
    """Computes `group_norm` in one group."""
    return group_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Normed:
    """Computes `group_norm` in one group, with means as they are."""
    return group_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


def group_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Normed:
    """Computes `linear(group_norm(x))`.

    Args:
        x: `[..., C]`.
        norm_weight: `[C]`.
        norm_bias: `[C]`.
        linear_weight: `[D, C]`.
        linear_bias: `[D]`.
        residual: see `group_norm`.
        eps: see there.
        prenorm: see there.
        residual_in_fp32: see there.
        is_rms_norm: see there.
        num_groups: see there.

    Returns:
        `[..., D]`, and with `prenorm` the sum, `[..., C]`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    wide, total = summed(x, residual, in_fp32=residual_in_fp32)
    normed = affine(wide, norm_weight, norm_bias, eps=eps, rms=is_rms_norm, groups=num_groups).to(x.dtype)
    out = projected(normed, linear_weight, linear_bias)
    return (out, total) if prenorm else out


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Normed:
    """Computes `group_norm_linear`."""
    return group_norm_linear(
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps,
        prenorm,
        residual_in_fp32,
        is_rms_norm,
        num_groups,
    )


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Normed:
    """Computes `group_norm_linear` in one group, with means as they are."""
    return group_norm_linear(
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual,
        eps,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
    )


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """Computes `x / sqrt(sum(x ** 2) + eps)` along the last axis, in `output_dtype` or as `x`."""
    wide = widened(x)
    unit = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return unit.to(x.dtype if output_dtype is None else output_dtype)
