"""Decoding with a cache of keys and values, and merging of results over disjoint sets of keys.

Sources: FlashAttention's `flash_attn_with_kvcache` (its order and meaning of arguments); Flash-Decoding, Dao et al. 2023;
LeanAttention, Sanovar et al. 2024; rotary embedding, Su et al. 2021. Windows, soft-cap, ALiBi and sinks: see `subquad.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .. import _native

if TYPE_CHECKING:
    ArrayT = TypeVar("ArrayT")


def attention_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any | None = None,
    v: Any | None = None,
    rotary_cos: Any | None = None,
    rotary_sin: Any | None = None,
    cache_seqlens: Any | None = None,
    cache_batch_idx: Any | None = None,
    cache_leftpad: Any | None = None,
    block_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002 - FlashAttention's signature
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    rotary_interleaved: bool = True,  # noqa: FBT001, FBT002 - FlashAttention's signature
    alibi_slopes: Any | None = None,
    num_splits: int | None = None,
    return_softmax_lse: bool = False,  # noqa: FBT001, FBT002 - FlashAttention's signature
    *,
    sinks: Any | None = None,
) -> Any:
    """Appends new keys and values to a cache in place, then attends to what the cache holds.

    Keys and values are read where they lie, once per key/value head; long caches are split over threads. Forward only. All arrays
    are of one library and, but for the integers, one dtype.

    Args:
        q: queries, `[B, Sq, H, D]`; float32, float64, float16 or bfloat16.
        k_cache: `[rows, capacity, Hkv, D]`, or `[pages, page_size, Hkv, D]` with `block_table`; any strides with a contiguous last
            axis. `Hkv` divides `H`.
        v_cache: as `k_cache`, of width `Dv`.
        k: new keys, `[B, Sn, Hkv, D]`, written at positions `cache_seqlens` and following. Given together with `v`.
        v: new values, `[B, Sn, Hkv, Dv]`.
        rotary_cos: `[positions, R / 2]`, contiguous, `R <= D`: the first `R` elements of new keys and of queries are rotated. The
            position of a token counts from the left padding; queries are at the positions of the new keys if `causal`, else all at
            the first of them.
        rotary_sin: as `rotary_cos`.
        cache_seqlens: tokens in the cache before the new ones: int32 or int64 `[B]`, or one integer. Default: the capacity.
        cache_batch_idx: row of the cache of each sequence, int32 or int64 `[B]`. Default: 0 to `B - 1`.
        cache_leftpad: tokens at the start of each sequence that are hidden: int32 or int64 `[B]`, or one integer.
        block_table: pages of each sequence, int32 or int64 `[B, pages]`; pages of any size.
        softmax_scale: factor of the scores. Default: `D ** -0.5`.
        causal: whether query `i` sees only the keys up to its position, `p = length - Sq + i`, the length being that with the new
            keys: the last query sees all (bottom-right alignment).
        window_size: `(left, right)`: query `i` sees only the keys from `p - left` to `p + right`. `None` and negative numbers are
            unbounded. With `causal` the right side is at most 0. What a window hides is not read.
        softcap: scaled scores become `softcap * tanh(score / softcap)`. `None` and 0: they stay.
        rotary_interleaved: whether elements `2 i` and `2 i + 1` are rotated together, rather than `i` and `i + R / 2`.
        alibi_slopes: slopes of ALiBi, `[H]` or `[B, H]`, float32: `-slope * |p - j|` is added to the score of key `j`.
        num_splits: pieces that the keys are split into. Default (and 0): from the lengths.
        return_softmax_lse: whether to return the logarithm of the sum of exponentials as well.
        sinks: a logit of each head, `[H]`, float32 or q's dtype, that takes part in the sum of exponentials and has no value.

    Returns:
        The output, `[B, Sq, H, Dv]`; with `return_softmax_lse` a pair of it and `lse`, `[B, H, Sq]`, float32 (float64 for float64
        inputs). A query that sees no key gives zeros and `lse = -inf` (with a sink, the sink). What lies beyond the lengths has no
        influence, not even NaN.

    Raises:
        ValueError: for shapes that do not fit, a negative or infinite soft-cap, lengths beyond the capacity, rows or pages out of
            range, rows or pages of several sequences that are appended to, memory that overlaps or is read-only. The cache is then
            as it was.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
        NotImplementedError: for tensors that require grad while gradients are enabled.
    """
    return _native.attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        num_splits,
        return_softmax_lse,
        sinks=sinks,
    )


def merge_attention(outs: Sequence[ArrayT], lses: Sequence[ArrayT]) -> tuple[ArrayT, ArrayT]:
    """Merges attention over disjoint sets of keys into attention over their union.

    `lse = log(sum_i exp(lse_i))`, `out = sum_i exp(lse_i - lse) out_i`, computed in float64.

    Args:
        outs: results over each set, `[B, S, H, D]` each, of one library and dtype.
        lses: their log-sum-exps (natural logarithm), `[B, H, S]` each, float32 (float64 for float64 results). Where one is `-inf`,
            the result counts for nothing, whatever it holds.

    Returns:
        The merged result and its log-sum-exp. Where all are `-inf`, 0 and `-inf`.

    Raises:
        ValueError: for shapes that differ, or not as many `lses` as `outs`.
        TypeError: for dtypes that are not supported or differ, mixed libraries.
    """
    merged: tuple[ArrayT, ArrayT] = _native.merge_attention(list(outs), list(lses))
    return merged
