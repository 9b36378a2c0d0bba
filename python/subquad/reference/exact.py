"""Exact attention by its definition."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def _softmax(scores: Float64, visible: npt.NDArray[np.bool_], values: Float64) -> tuple[Float64, Float64]:
    """Returns the weighted sum of the visible `values` `[..., K, D]`, and the log-sum-exp, under `scores` `[..., Q, K]`."""
    scores = np.where(visible, scores, -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    base = np.where(np.isneginf(peak), 0.0, peak)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weights = np.where(visible, np.exp(scores - base), 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        lse = base + np.log(total)
        # A hidden value must not count, and 0 * inf is NaN: rows that see every non-finite value multiply it, others drop it.
        out = weights @ np.where(np.isfinite(values), values, 0.0)
        for place in np.argwhere(~np.isfinite(values).all(axis=-1)):
            *stack, key = place
            row = values[(*stack, key)]
            seen = visible[(*stack, slice(None), key)]
            extra = weights[(*stack, slice(None), key)][..., None] * np.where(np.isfinite(row), 0.0, row)
            out[tuple(stack)] += np.where(seen[..., None], extra, 0.0)
        out = np.where(total == 0.0, 0.0, out / np.where(total == 0.0, 1.0, total))
    return out, lse[..., 0]


def _split_bias(bias: Array | None, shape: tuple[int, ...]) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Returns what a mask adds and which keys it shows, both broadcast to `shape`."""
    if bias is None:
        return np.zeros(shape), np.ones(shape, dtype=bool)
    if bias.dtype == np.bool_:
        return np.zeros(shape), np.broadcast_to(bias, shape)
    added = np.broadcast_to(bias.astype(np.float64), shape)
    return added, ~np.isneginf(added)


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    bias: Array | None = ...,
    return_lse: Literal[False] = ...,
) -> Float64: ...


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    bias: Array | None = ...,
    return_lse: Literal[True],
) -> tuple[Float64, Float64]: ...


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Array | None = None,
    return_lse: bool = False,
) -> Float64 | tuple[Float64, Float64]:
    """`subquad.attention` in float64.

    Args:
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`, `Hkv` a divisor of `H`.
        v: `[B, Sk, Hkv, Dv]`.
        causal: whether query `i` sees only keys `j <= i + Sk - Sq`.
        scale: factor of the scores. Default: `D ** -0.5`.
        bias: boolean (False hides) or added to the scaled scores, broadcastable to `[B, H, Sq, Sk]`.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        `[B, Sq, H, Dv]`, and with `return_lse` also `[B, H, Sq]`.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads if kv_heads else 1
    q, k, v = (np.moveaxis(x.astype(np.float64), 2, 1) for x in (q, k, v))
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = max(head_dim, 1) ** -0.5 if scale is None else scale
    added, visible = _split_bias(bias, (batch, heads, seqlen_q, seqlen_k))
    if causal:
        reach = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        visible = visible & (np.arange(seqlen_k) <= reach)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * (q @ np.swapaxes(k, -1, -2)) + added
    out, lse = _softmax(scores, visible, v)
    out = np.moveaxis(out, 1, 2)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float64:
    """`subquad.scaled_dot_product_attention` in float64: `[..., H, L, E]`, causal from the top left.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., H, S, E]`.
        value: `[..., H, S, Ev]`.
        attn_mask: boolean (False hides) or added to the scaled scores, broadcastable to `[..., H, L, S]`.
        is_causal: whether query `i` sees only keys `j <= i`.
        scale: factor of the scores. Default: `E ** -0.5`.
        enable_gqa: whether key and value may have fewer heads.

    Returns:
        `[..., H, L, Ev]`.
    """
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    if enable_gqa:
        key, value = (np.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * (query @ np.swapaxes(key, -1, -2))
    stack = np.broadcast_shapes(scores.shape[:-2], value.shape[:-2])
    scores = np.broadcast_to(scores, (*stack, *scores.shape[-2:]))
    added, visible = _split_bias(attn_mask, scores.shape)
    if is_causal:
        visible = visible & np.tri(*scores.shape[-2:], dtype=np.bool_)
    with np.errstate(invalid="ignore"):
        scores = scores + added
    return _softmax(scores, visible, np.broadcast_to(value, (*stack, *value.shape[-2:])))[0]
