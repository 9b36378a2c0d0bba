"""Norms that recurrent layers end with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .gates import Array, Float64, sigmoid, silu


def rms_norm_gated(
    x: Array,
    g: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    activation: str = "swish",
    residual: Array | None = None,
    eps: float = 1e-6,
) -> tuple[Float64, Float64]:
    """RMSNorm in float64, times the activation of gates.

    Args:
        x: `[..., C]`.
        g: as `x`.
        weight: `[C]`; `None` is 1.
        bias: `[C]`; `None` is 0.
        activation: `swish`, `silu` or `sigmoid`.
        residual: as `x`; `None` is 0.
        eps: is added to the mean of squares.

    Returns:
        The outputs and the sums of `x` and the residual, as `x`.
    """
    rows: npt.NDArray[Any] = x.astype(np.float64)
    if residual is not None:
        rows = rows + residual.astype(np.float64)
    normed = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + eps)
    if weight is not None:
        normed = normed * weight.astype(np.float64)
    if bias is not None:
        normed = normed + bias.astype(np.float64)
    return normed * (sigmoid(g) if activation == "sigmoid" else silu(g)), rows
