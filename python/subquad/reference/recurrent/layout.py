"""Heads, scales and norms of queries and keys, and where packed sequences begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def scale_of(scale: float | None, width: int) -> float:
    """Returns the factor of the queries, by default `K ** -0.5`."""
    return float(max(width, 1) ** -0.5) if scale is None else scale


def repeat_heads(x: Array, heads: int) -> Array:
    """Returns `[B, T, H, ...]` with `heads` heads: each head serves `heads / H` consecutive ones."""
    return np.repeat(x, heads // x.shape[2], axis=2)


def l2norm(x: Array) -> Array:
    """Returns vectors divided by their length, `x / sqrt(sum(x ** 2) + 1e-6)` along the last axis."""
    normed: Array = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)
    return normed


def queries_and_keys(
    q: Array, k: Array, scale: float | None, heads: int, *, use_qk_l2norm: bool = False
) -> tuple[Float64, Float64]:
    """Returns the queries, scaled, and the keys in float64.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        scale: of the queries, by default `K ** -0.5`.
        heads: how many heads to repeat them to.
        use_qk_l2norm: whether both are divided by their lengths first.
    """
    q, k = (repeat_heads(x.astype(np.float64), heads) for x in (q, k))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    return q * scale_of(scale, q.shape[-1]), k


def log_decays(
    g: Array | None = None, gk: Array | None = None, gv: Array | None = None
) -> tuple[Float64, ...]:
    """Returns logarithms of decays as what multiplies states `[B, T, H, K, V]`.

    Args:
        g: of whole states, `[B, T, H]`.
        gk: of their rows, `[B, T, H, K]`.
        gv: of their columns, `[B, T, H, V]`.
    """
    given = ((g, (-1, -2)), (gk, (-1,)), (gv, (-2,)))
    return tuple(np.expand_dims(x.astype(np.float64), axes) for x, axes in given if x is not None)


def starts_of(seq_idx: Array | None, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Returns at which tokens a new sequence begins, `[B, T]`.

    Args:
        seq_idx: the number of the sequence of each token, `[B, T]`, or `None`: one sequence. What was before the first token is
            sequence 0.
        shape: `(B, T)`.
    """
    if seq_idx is None:
        return np.zeros(shape, dtype=bool)
    starts: npt.NDArray[np.bool_] = np.diff(np.asarray(seq_idx).astype(np.int64), axis=1, prepend=0) != 0
    return starts
