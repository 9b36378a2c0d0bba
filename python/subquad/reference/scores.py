"""What happens to the products of queries and keys before they become weights, in the arithmetic of the products."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .visibility import visible_keys

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]


class Scores(NamedTuple):
    """The scores of a call, `[B, H, Sq, Sk]` unless said otherwise."""

    values: Array
    visible: Bool
    slopes: Array
    """The derivative of each with respect to the product of its query and key."""

    counts: npt.NDArray[np.int64]
    """How many keys a query sees, whatever `bias` hides, `[B, H, Sq, 1]`."""


def by_head(x: Array, heads: int) -> Array:
    """Returns queries, keys or values `[B, S, H or Hkv, D]` as `[B, H, S, D]`."""
    kv_heads = x.shape[2]
    return np.repeat(np.moveaxis(x, 2, 1), heads // kv_heads if kv_heads else 1, axis=1)


def per_query(array: Any, shape: tuple[int, ...], dtype: Any) -> Array:
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


def sink_logits(sinks: Array, shape: tuple[int, ...], dtype: Any) -> Array:
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


def distances(shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns `|p - j|`, `[Sq, Sk]`, for scores of shape `[B, H, Sq, Sk]`."""
    seqlen_q, seqlen_k = shape[2:]
    offsets: Array = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - np.arange(seqlen_k)
    return np.abs(offsets).astype(dtype)


def per_head(alibi_slopes: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns slopes `[H]` or `[B, H]`, broadcast to `[B, H, 1, 1]` in `dtype`."""
    return np.broadcast_to(alibi_slopes.astype(dtype), shape[:2])[:, :, None, None]


def by_diagonal(relative_bias: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns `relative_bias[h, j - i + Sq - 1]`, `[H or 1, Sq, Sk]`."""
    seqlen_q, seqlen_k = shape[2:]
    index = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None] + seqlen_q - 1
    biases: Array = relative_bias.astype(dtype)[:, index]
    return biases


def scores_of(
    products: Array,
    head_dim: int,
    *,
    causal: bool = False,
    window_size: Any | None = None,
    mask: Any | None = None,
    scale: Any | None = None,
    bias: Any | None = None,
    relative_bias: Array | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    length_scale: Array | None = None,
) -> Scores:
    """Returns the scores that products of queries and keys become, in the arithmetic of the products.

    Args:
        products: of queries and keys, `[B, H, Sq, Sk]`.
        head_dim: `D`, for the default scale.
        causal: see `visible_keys`.
        window_size: see there.
        mask: see there.
        scale: see `scales`.
        bias: what broadcasts to the scores: boolean (False hides), or what is added to them (`-inf` hides); or `None`.
        relative_bias: `[H or 1, Sq + Sk - 1]`, or `None`.
        softcap: `c` of `c * tanh(score / c)`, or `None`.
        alibi_slopes: `[H]` or `[B, H]`, or `None`.
        length_scale: see `scales`.
    """
    shape, dtype = products.shape, products.dtype.type
    visible = visible_keys(shape, causal=causal, window_size=window_size, mask=mask)
    factor = scales(scale, length_scale, head_dim, visible, dtype)
    added, shown = split_bias(bias, shape, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        scores, slopes = factor * products, np.broadcast_to(factor, shape)
        if softcap is not None:
            capped = np.tanh(scores / dtype(softcap))
            scores, slopes = dtype(softcap) * capped, slopes * (dtype(1) - capped * capped)
        if alibi_slopes is not None:
            scores = scores - per_head(alibi_slopes, shape, dtype) * distances(shape, dtype)
        if bias is not None:
            scores = scores + added
        if relative_bias is not None:
            scores = scores + by_diagonal(relative_bias, shape, dtype)
    return Scores(scores, visible & shown, slopes, visible.sum(axis=-1, keepdims=True))
