"""What happens to the products of queries and keys before they become weights, in the arithmetic of the products."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]


def per_query(array: Any, shape: tuple[int, int, int], dtype: Any) -> Array:
    """Returns numbers of each query, broadcast to `[B, H, Sq, 1]` in `dtype`."""
    return np.broadcast_to(np.asarray(array).astype(dtype), shape)[..., None]


def scales(scale: Any | None, length_scale: Array | None, head_dim: int, visible: Bool, dtype: Any) -> Array:
    """Returns the scale of each query, `[B, H, Sq, 1]`.

    Args:
        scale: a number, what broadcasts to `[B, H, Sq]`, or `None`: `D ** -0.5`.
        length_scale: `[Sk + 1]`: further factor of the queries that see so many keys, or `None`.
        head_dim: `D`.
        visible: the keys that count as seen, `[B, H, Sq, Sk]`.
        dtype: of the result.
    """
    scale = max(head_dim, 1) ** -0.5 if scale is None else scale
    result = per_query(scale, visible.shape[:3], dtype)
    if length_scale is not None:
        result = result * length_scale.astype(dtype)[visible.sum(axis=-1)][..., None]
    return result


def sink_logits(sinks: Array, shape: tuple[int, int, int], dtype: Any) -> Array:
    """Returns the sink of each query, `[B, H, Sq, 1]`, for sinks of heads `[H]` or of rank 2 or 3."""
    return per_query(sinks[:, None] if sinks.ndim == 1 else sinks, shape, dtype)


def split_bias(bias: Any | None, shape: tuple[int, ...], dtype: Any) -> tuple[Array, Bool]:
    """Returns what a dense mask adds, in `dtype`, and which keys it shows, both broadcast to `shape`."""
    if bias is None:
        return np.zeros(shape, dtype), np.ones(shape, dtype=bool)
    bias = np.asarray(bias)
    if bias.dtype == np.bool_:
        return np.zeros(shape, dtype), np.broadcast_to(bias, shape)
    added = np.broadcast_to(bias.astype(dtype), shape)
    return added, ~np.isneginf(added)


def distances(alibi_slopes: Array, shape: tuple[int, int, int, int], dtype: Any) -> Array:
    """Returns what ALiBi adds, `-slope * |p - j|`, for slopes `[H]` or `[B, H]`, broadcast to `[B, H, Sq, Sk]`."""
    seqlen_q, seqlen_k = shape[2:]
    distance = np.abs(np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - np.arange(seqlen_k)).astype(dtype)
    slopes: Array = np.broadcast_to(alibi_slopes.astype(dtype), shape[:2])[:, :, None, None]
    added: Array = -slopes * distance
    return added


def by_diagonal(relative_bias: Array, shape: tuple[int, int, int, int], dtype: Any) -> Array:
    """Returns `relative_bias[h, j - i + Sq - 1]`, `[H or 1, Sq, Sk]`."""
    seqlen_q, seqlen_k = shape[2:]
    index = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None] + seqlen_q - 1
    biases: Array = relative_bias.astype(dtype)[:, index]
    return biases


def modified(
    scores: Array,
    *,
    softcap: float | None,
    alibi_slopes: Array | None,
    bias: Any | None,
    relative_bias: Array | None,
) -> tuple[Array, Bool]:
    """Returns scores with cap and biases, `[B, H, Sq, Sk]` of the same dtype, and which keys the dense bias shows.

    Args:
        scores: scaled products of queries and keys, `[B, H, Sq, Sk]`.
        softcap: `c` of `c * tanh(score / c)`, or `None`.
        alibi_slopes: `[H]` or `[B, H]`, or `None`.
        bias: what broadcasts to the scores: boolean, or what is added to them; or `None`.
        relative_bias: `[H or 1, Sq + Sk - 1]`, or `None`.
    """
    shape, dtype = scores.shape, scores.dtype.type
    if softcap is not None:
        scores = dtype(softcap) * np.tanh(scores / dtype(softcap))
    if alibi_slopes is not None:
        scores = scores + distances(alibi_slopes, shape, dtype)
    added, shown = split_bias(bias, shape, dtype)
    if bias is not None:
        scores = scores + added
    if relative_bias is not None:
        scores = scores + by_diagonal(relative_bias, shape, dtype)
    return scores, shown
