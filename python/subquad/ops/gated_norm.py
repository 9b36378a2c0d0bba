"""RMSNorm that is gated, as layers of linear attention end.

Source: Root Mean Square Layer Normalization, Zhang and Sennrich 2019; the gate is that of Mamba-2, Dao and Gu 2024.
"""

from __future__ import annotations

from math import prod
from typing import Any

from .. import _native
from .namespace import cast, namespace_of, widened
from .pytorch import REFUSALS, calls, calls_at_once, is_tensor, is_watched

# The signature is flash-linear-attention's.
# ruff: noqa: FBT001, FBT002

_MOST_AXES = 4


def rms_norm_gated(
    x: Any,
    g: Any,
    weight: Any | None,
    bias: Any | None,
    activation: str = "swish",
    residual: Any | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """Computes `(y / sqrt(mean(y ** 2) + eps) * weight + bias) * activation(g)` for each row of `y = x + residual`.

    Sums are float32 (float64 for float64 inputs), and results are rounded once. PyTorch differentiates it, any number of times.

    Args:
        x: `[..., C]`; float32, float64, float16 or bfloat16.
        g: gates, as many as `x` has elements, of x's dtype.
        weight: `[C]`, of x's dtype, or float32 beside the half types. `None`: 1.
        bias: `[C]`, likewise. `None`: 0.
        activation: "swish" or "silu", which is the same, or "sigmoid".
        residual: as `x`, of any dtype.
        prenorm: whether to return the sum as well.
        residual_in_fp32: whether that is float32 where there is no residual.
        eps: is added to the mean of squares.

    Returns:
        As `x`, and with `prenorm` also the sum, of the dtype of the residual, or of `x`.

    Raises:
        ValueError: for shapes that do not fit, other activations, arrays on other devices.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
    """
    if activation not in ("swish", "silu", "sigmoid"):
        raise ValueError(f"activation: expected 'swish', 'silu' or 'sigmoid', got {activation!r}")
    carried, rows = x, x
    if residual is not None:
        if tuple(residual.shape) != tuple(x.shape):
            raise ValueError(
                f"residual: expected shape {tuple(x.shape)} as x has, got {tuple(residual.shape)}"
            )
        rows = widened("x", x) + widened("residual", residual)
        carried = cast(rows, residual.dtype)
        g = cast(g, rows.dtype)
    elif prenorm and residual_in_fp32:
        carried = cast(x, namespace_of("x", x).float32)
    normed = cast(_of_rows(rows, g, weight, bias, silu=activation != "sigmoid", eps=eps), x.dtype)
    return (normed, carried) if prenorm else normed


def _of_rows(x: Any, g: Any, weight: Any | None, bias: Any | None, *, silu: bool, eps: float) -> Any:
    """Computes it without a residual, `[..., C]` of any rank."""
    shape = tuple(getattr(x, "shape", ()))
    if hasattr(g, "shape") and tuple(g.shape) != shape and prod(g.shape) == prod(shape):
        g = g.reshape(shape)
    if len(shape) <= _MOST_AXES:
        return _computed(x, g, weight, bias, silu=silu, eps=eps)
    flat = (-1, shape[-1])
    return _computed(x.reshape(flat), g.reshape(flat), weight, bias, silu=silu, eps=eps).reshape(shape)


def _computed(x: Any, g: Any, weight: Any | None, bias: Any | None, *, silu: bool, eps: float) -> Any:
    watched = is_watched()
    if not watched:
        try:
            return _native.rms_norm_gated(x, g, weight, bias, silu, eps)
        except REFUSALS:
            if not is_tensor(x):
                raise
    compute = (calls() if watched else calls_at_once()).rms_norm_gated
    return compute(x, g, weight, bias, silu=silu, eps=eps)
