"""Attention over sequences of different lengths that lie one after the other, without padding.

Source: FlashAttention's `flash_attn_varlen_func` (its order and meaning of arguments), Dao 2023.
"""

from __future__ import annotations

from typing import Any

from .. import _native
from .pytorch import REFUSALS, calls, is_tensor, is_watched


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002 - FlashAttention's signature
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,  # noqa: FBT001, FBT002 - FlashAttention's signature
    return_attn_probs: bool = False,  # noqa: FBT001, FBT002 - FlashAttention's signature
    block_table: Any | None = None,
    *,
    sinks: Any | None = None,
    return_lse: bool = False,
) -> Any:
    """Computes attention within each of `B` sequences, as `subquad.attention` would on each alone.

    Sequence `b` has the queries `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1` and the keys `cu_seqlens_k[b]` to
    `cu_seqlens_k[b + 1] - 1`. Its last query is at its last key: `causal`, windows and ALiBi count from there (bottom-right
    alignment).

    Args:
        q: queries, `[total_q, H, D]`; float32, float64, float16 or bfloat16.
        k: keys, `[total_k, Hkv, D]`, or `[pages, page_size, Hkv, D]` with `block_table`; of q's library and dtype. `Hkv` divides
            `H`.
        v: values, as `k`, of width `Dv`.
        cu_seqlens_q: cumulative lengths, int32 `[B + 1]`: 0 first, the next never smaller, `total_q` last. Sequences may be empty.
        cu_seqlens_k: the same of the keys; `total_k` is the last, unless there are pages.
        max_seqlen_q: the length of the longest sequence or more. Not needed, and checked if given.
        max_seqlen_k: the same of the keys.
        dropout_p: must be 0.
        softmax_scale: factor of the scores. Default: `D ** -0.5`.
        causal: whether query `i` sees only the keys up to its position `p`.
        window_size: `(left, right)`: query `i` sees only the keys from `p - left` to `p + right` of its sequence. `None` and
            negative numbers are unbounded. With `causal` the right side is at most 0.
        softcap: scaled scores become `softcap * tanh(score / softcap)`. 0 and `None`: they stay.
        alibi_slopes: slopes of ALiBi, `[H]` or `[B, H]`, float32: `-slope * |p - j|` is added to the score of key `j`.
        deterministic: no effect: results never depend on threads or on the run.
        return_attn_probs: whether to return what FlashAttention does: the output, `lse`, and `None` in the place of the
            probabilities, which it only has for dropout.
        block_table: pages of each sequence, int32 or int64 `[B, pages]`; pages of any size. Entries beyond a sequence are not
            looked at.
        sinks: a logit of each head, `[H]`, float32 or q's dtype, that takes part in the sum of exponentials and has no value.
        return_lse: whether to return the logarithm of the sum of exponentials as well. Not together with `return_attn_probs`.

    Returns:
        The output, `[total_q, H, Dv]` of q's library and dtype; with `return_lse` a pair of it and `lse`, `[H, total_q]`, float32
        (float64 for float64 inputs). A query that sees no key gives zeros and `lse = -inf` (with a sink, the sink). Hidden keys and
        values, those of other sequences among them, have no influence, not even NaN.

    Raises:
        ValueError: for shapes that do not fit, cumulative lengths that do not start at 0, decrease, or do not end at the number of
            queries or keys, a maximum that a sequence exceeds, pages out of range, a negative or infinite soft-cap, `return_lse`
            together with `return_attn_probs`.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, windows of another kind, mixed
            libraries.
        NotImplementedError: for dropout, heads wider than 1024, gradients of what lies in pages, and the derivatives that
            `subquad.attention` has not.
    """
    refuse_dropout(dropout_p)
    if return_lse and return_attn_probs:
        raise ValueError(
            "return_lse: expected False together with return_attn_probs, which returns it, got True"
        )
    with_lse = return_lse or return_attn_probs
    # A tensor converts to the number that is expected here, and would lose its gradient.
    if not is_watched() and not is_tensor(softcap) and not is_tensor(softmax_scale):
        try:
            result = _native.attention_varlen(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
                block_table=block_table,
                sinks=sinks,
                return_lse=with_lse,
            )
            return (*result, None) if return_attn_probs else result
        except REFUSALS:
            if not is_tensor(q):
                raise
    options = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "block_table": block_table,
        "sinks": sinks,
    }
    result = calls().attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, options, return_lse=with_lse)
    return (*result, None) if return_attn_probs else result


def refuse_dropout(dropout_p: float) -> None:
    """Raises `NotImplementedError` for any probability of dropout but 0."""
    if dropout_p != 0:
        raise NotImplementedError(
            f"dropout_p: probability {dropout_p} is not supported; pass 0, as models do when they are not trained"
        )
