"""The functions of FlashAttention 2 by their names, with their arguments, on CPUs, for PyTorch, NumPy and other arrays.

`from subquad.flash_attn import flash_attn_func` in the place of `from flash_attn import flash_attn_func`. All dtypes and head
widths of `subquad.attention` are accepted, pages of any size too. `dropout_p` of packed sequences must be 0, caches have no
gradients, `deterministic` has no effect (results always are), and `return_attn_probs` returns the output, the log-sum-exp and
`None`: FlashAttention has probabilities only for tests of its dropout. Packed arguments are taken apart by indexing and never
copied.

Source: FlashAttention-2, Dao 2023, and the documentation of its Python functions.
"""

from __future__ import annotations

from typing import Any

from .ops.exact import attention
from .ops.kvcache import attention_with_kvcache
from .ops.varlen import attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# Their signatures have boolean arguments by position.
# ruff: noqa: FBT001, FBT002

Window = tuple[int | None, int | None]


def _parts(name: str, packed: Any, axis: int, count: int) -> list[Any]:
    """Returns the `count` views of an array along `axis`."""
    shape = tuple(packed.shape)
    if len(shape) != axis + 3 or shape[axis] != count:
        leading = ["B, S", "total"][axis == 1]
        raise ValueError(f"{name}: expected shape [{leading}, {count}, H, D], got {shape}")
    return [packed[(slice(None),) * axis + (i,)] for i in range(count)]


def _window(window_size: Any) -> Any:
    """Returns the window with `None` for unbounded sides; what is no pair of integers is for the extension to refuse."""
    if not isinstance(window_size, (tuple, list)):
        return window_size
    return tuple(None if hasattr(side, "__index__") and side < 0 else side for side in window_size)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_func`: attention of `q` to `k` and `v`; see `subquad.attention`.

    Args:
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`, `Hkv` a divisor of `H`.
        v: `[B, Sk, Hkv, Dv]`.
        dropout_p: probability of each weight to be dropped, as `subquad.attention` does; its seed comes from PyTorch's generator.
        softmax_scale: factor of the scores. Default: `D ** -0.5`.
        causal: whether query `i` sees only keys `j <= i + Sk - Sq`.
        window_size: `(left, right)`: keys that are seen before and after the query's own; -1 (any negative number, `None`) is
            unbounded.
        softcap: `softcap * tanh(score / softcap)`; 0 is off.
        alibi_slopes: `[H]` or `[B, H]`, float32.
        deterministic: no effect.
        return_attn_probs: whether to return `(out, lse, None)`, lse `[B, H, Sq]`.

    Returns:
        `[B, Sq, H, Dv]`, or the triple.

    Raises:
        NotImplementedError: for the derivatives that `subquad.attention` has not.
        ValueError: see `subquad.attention`.
        TypeError: see `subquad.attention`.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": _window(window_size),
        "scale": softmax_scale,
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }
    if not return_attn_probs:
        return attention(q, k, v, **options)
    return (*attention(q, k, v, return_lse=True, **options), None)


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_kvpacked_func`: `flash_attn_func` of `kv`, `[B, Sk, 2, Hkv, D]`."""
    k, v = _parts("kv", kv, 2, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_qkvpacked_func`: `flash_attn_func` of `qkv`, `[B, S, 3, H, D]`."""
    q, k, v = _parts("qkv", qkv, 2, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any | None = None,
) -> Any:
    """`flash_attn.flash_attn_varlen_func`: sequences one after the other; see `subquad.attention_varlen`.

    Args:
        q: `[total_q, H, D]`.
        k: `[total_k, Hkv, D]`, or `[pages, page_size, Hkv, D]` with `block_table`.
        v: as `k`, of width `Dv`.
        cu_seqlens_q: int32 `[B + 1]`.
        cu_seqlens_k: int32 `[B + 1]`.
        max_seqlen_q: the length of the longest sequence or more.
        max_seqlen_k: the same of the keys.
        dropout_p: must be 0.
        softmax_scale: see `flash_attn_func`, as for all that are not named here.
        causal: aligned at the end of each sequence.
        window_size: `(left, right)`.
        softcap: 0 is off.
        alibi_slopes: `[H]` or `[B, H]`, float32.
        deterministic: no effect.
        return_attn_probs: whether to return `(out, lse, None)`, lse `[H, total_q]`.
        block_table: int32 or int64 `[B, pages]`.

    Returns:
        `[total_q, H, Dv]`, or the triple.

    Raises:
        NotImplementedError: for dropout, gradients of what lies in pages, and the derivatives that `subquad.attention` has not.
        ValueError: see `subquad.attention_varlen`.
        TypeError: see `subquad.attention_varlen`.
    """
    return attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        block_table,
    )


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_varlen_kvpacked_func`: `flash_attn_varlen_func` of `kv`, `[total_k, 2, Hkv, D]`."""
    k, v = _parts("kv", kv, 1, 2)
    return attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_varlen_qkvpacked_func`: `flash_attn_varlen_func` of `qkv`, `[total, 3, H, D]`."""
    q, k, v = _parts("qkv", qkv, 1, 3)
    return attention_varlen(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
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
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """`flash_attn.flash_attn_with_kvcache`: appends to a cache in place and attends to it; see `subquad.attention_with_kvcache`."""
    return attention_with_kvcache(
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
    )
