"""What stands in for the extension where PyTorch has to know of a gated norm: see `subquad.torch.calls`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu as silu_of

from subquad import _native
from subquad.torch.plain import Route, route


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_gated(x: Any, g: Any, weight: Any, bias: Any, *, silu: bool, eps: float) -> Any:
    """Computes what `subquad.ops.rms_norm_gated` asks of the extension, in operators of PyTorch where these are recorded.

    Args:
        x: `[..., C]`.
        g: as `x`.
        weight: `[C]` or `None`.
        bias: `[C]` or `None`.
        silu: whether gates are `g * sigmoid(g)`, else `sigmoid(g)`.
        eps: is added to the mean of squares.

    Returns:
        As `x`.
    """
    if route((x, g, weight, bias)) is Route.EXTENSION:
        return _native.rms_norm_gated(x, g, weight, bias, silu, eps)
    rows = _wide(x)
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * _wide(weight)
    if bias is not None:
        normed = normed + _wide(bias)
    gates = _wide(g)
    return (normed * (silu_of(gates) if silu else gates.sigmoid())).to(x.dtype)
