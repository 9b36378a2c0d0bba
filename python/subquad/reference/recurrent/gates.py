"""Activations of gates, and the fused gates of delta rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def softplus(x: Array) -> Float64:
    """Returns `log(1 + exp(x))`. PyTorch's returns `x` itself above 20, which is 2e-9 less at most."""
    return np.logaddexp(0.0, x.astype(np.float64))


def sigmoid(x: Array) -> Float64:
    """Returns `1 / (1 + exp(-x))`."""
    return np.exp(-softplus(-x.astype(np.float64)))


def silu(x: Array) -> Float64:
    """Returns `x * sigmoid(x)`."""
    return x.astype(np.float64) * sigmoid(x)


def gdn_gate(g: Array, A_log: Array, dt_bias: Array | None = None) -> Float64:
    """The log decay of the gated delta rule in float64, `-exp(A_log) * softplus(g + dt_bias)`.

    Gated Delta Networks, Yang et al. 2024; the form is that of Mamba-2.

    Args:
        g: `[..., H]`.
        A_log: `[H]`.
        dt_bias: `[H]`; `None` is 0.

    Returns:
        `[..., H]`.
    """
    bias = 0.0 if dt_bias is None else dt_bias.astype(np.float64)
    decay: Float64 = -np.exp(A_log.astype(np.float64)) * softplus(g.astype(np.float64) + bias)
    return decay


def kda_gate(
    g: Array, A_log: Array | None = None, dt_bias: Array | None = None, lower_bound: float | None = None
) -> Float64:
    """The log decay of Kimi Delta Attention in float64.

    `-exp(A_log) * softplus(g + dt_bias)`; with a lower bound `lower_bound * sigmoid(exp(A_log) * (g + dt_bias))`.

    Kimi Linear, Kimi Team 2025.

    Args:
        g: `[..., H, K]`.
        A_log: `H` numbers of any shape; `None`, with a lower bound only, is 0.
        dt_bias: `H * K` numbers of any shape; `None` is 0.
        lower_bound: below 0, or `None`.

    Returns:
        `[..., H, K]`.

    Raises:
        ValueError: for neither `A_log` nor a lower bound.
    """
    if A_log is None and lower_bound is None:
        raise ValueError("A_log is needed where there is no lower_bound")
    x = g.astype(np.float64)
    if dt_bias is not None:
        x = x + dt_bias.astype(np.float64).reshape(g.shape[-2:])
    rate = 1.0 if A_log is None else np.exp(A_log.astype(np.float64)).reshape(-1, 1)
    decay: Float64 = -rate * softplus(x) if lower_bound is None else lower_bound * sigmoid(rate * x)
    return decay


def strengths(
    beta: Array | None, shape: tuple[int, ...], *, use_sigmoid: bool, allow_neg_eigval: bool
) -> Float64:
    """Returns how strongly delta rules write, `[B, T, H, 1]` or `[B, T, H, V]`.

    Args:
        beta: `[B, T, H]`, or `[B, T, H, V]` for each column of the state; `None` is 1.
        shape: `(B, T, H)`.
        use_sigmoid: whether `beta` is what a sigmoid is taken of.
        allow_neg_eigval: whether that sigmoid is doubled.
    """
    if beta is None:
        return np.ones((*shape, 1))
    beta = beta.astype(np.float64)
    if use_sigmoid:
        beta = sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)
    return beta if beta.ndim == len(shape) + 1 else beta[..., None]
