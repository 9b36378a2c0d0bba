"""Exact attention by its definition."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from .dropout import dropout_factors
from .scores import by_head, scores_of, sink_logits, split_bias
from .weights import normalized, softmax

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = ...,
    window_size: Any | None = ...,
    mask: Any | None = ...,
    scale: float | Array | None = ...,
    bias: Array | None = ...,
    relative_bias: Array | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    length_scale: Array | None = ...,
    normalizer: Any | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[False] = ...,
) -> Float64: ...


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = ...,
    window_size: Any | None = ...,
    mask: Any | None = ...,
    scale: float | Array | None = ...,
    bias: Array | None = ...,
    relative_bias: Array | None = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    length_scale: Array | None = ...,
    normalizer: Any | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Float64, Float64]: ...


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window_size: Any | None = None,
    mask: Any | None = None,
    scale: float | Array | None = None,
    bias: Array | None = None,
    relative_bias: Array | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    length_scale: Array | None = None,
    normalizer: Any | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
) -> Float64 | tuple[Float64, Float64]:
    """`subquad.attention` in float64.

    Query `i` is at the position `p = i + Sk - Sq` of key `p`.

    Args:
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`, `Hkv` a divisor of `H`.
        v: `[B, Sk, Hkv, Dv]`.
        causal: whether query `i` sees only keys `j <= p`.
        window_size: `(left, right)`, `H` such pairs, or integers `[H, 2]` (-1: unbounded): only keys `p - left <= j <= p + right`.
        mask: an object with a method `dense(B, Sq, Sk)` that returns the keys that are seen, `[B, Sq, Sk]`.
        scale: factor of the scores, a number or what broadcasts to `[B, H, Sq]`. Default: `D ** -0.5`.
        bias: boolean (False hides) or added to the scores, broadcastable to `[B, H, Sq, Sk]`.
        relative_bias: `[H or 1, Sq + Sk - 1]`; element `j - i + Sq - 1` is added.
        softcap: `c`: scaled scores become `c * tanh(score / c)`.
        alibi_slopes: `[H]` or `[B, H]`: `-slope * |p - j|` is added.
        sinks: `[H]`, or of rank 2 or 3 and broadcastable to `[B, H, Sq]`: a logit without a value.
        length_scale: `[Sk + 1]`: further factor of the scores of a query that sees so many keys by causal, window and mask.
        normalizer: an object of `subquad.normalizers` in the place of softmax.
        dropout_p: the probability of a weight to be dropped on the way to the output.
        dropout_seed: which ones; see `reference.dropout`.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        `[B, Sq, H, Dv]`, and with `return_lse` also `[B, H, Sq]`.
    """
    q, k, v = (by_head(x.astype(np.float64), q.shape[2]) for x in (q, k, v))
    with np.errstate(invalid="ignore", over="ignore"):
        products = q @ np.swapaxes(k, -1, -2)
    scores = scores_of(
        products,
        q.shape[-1],
        causal=causal,
        window_size=window_size,
        mask=mask,
        scale=scale,
        bias=bias,
        relative_bias=relative_bias,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        length_scale=length_scale,
    )
    factors = dropout_factors(products.shape, dropout_p, dropout_seed or 0) if dropout_p else None
    if normalizer is None:
        extra = None if sinks is None else sink_logits(sinks, q.shape[:3], np.float64)
        out, lse = softmax(scores.values, scores.visible, v, extra, factors)
    else:
        out, lse = normalized(scores.values, scores.visible, v, normalizer, scores.counts, factors)
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
    added, visible = split_bias(attn_mask, scores.shape, np.float64)
    if is_causal:
        visible = visible & np.tri(*scores.shape[-2:], dtype=np.bool_)
    with np.errstate(invalid="ignore"):
        scores = scores + added
    return softmax(scores, visible, np.broadcast_to(value, (*stack, *value.shape[-2:])))[0]
