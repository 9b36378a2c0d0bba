"""What flash-linear-attention's layers call for the short convolution of one more token, with its signature."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..ops.recurrent import renamed
from .norms import summed


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `subquad.ops.causal_conv1d` for one token of each sequence, which enters `cache` in place.

    Args:
        x: `[N, 1, D]`, `[1, N, D]` or `[N, D]`; the channels may be in several axes.
        cache: the last `W` tokens of each sequence, `[N, D, W]`, of the dtype of `x`.
        residual: what is added after the activation, as `x`.
        weight: `[D, W]`.
        bias: `[D]`.
        activation: `swish`, `silu` or `None`.

    Returns:
        As `x`, and `cache`.

    Raises:
        ValueError: for shapes and activations that do not fit.
        TypeError: for dtypes that are not supported or differ.
    """
    rows = x.flatten(0, 1).flatten(1) if x.ndim > 2 else x
    try:
        out = ops.causal_conv1d_update(rows, cache, weight, bias, activation)
    except (ValueError, TypeError) as error:
        raise type(error)(renamed(str(error), {"conv_state": "cache"})) from None
    out = out.view(x.shape)
    if residual is not None:
        out = summed(out, residual, in_fp32=False)[0].to(x.dtype)
    return out, cache
