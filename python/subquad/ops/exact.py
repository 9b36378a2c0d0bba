"""Exact attention: every score is computed, in tiles that never leave the cache.

Sources: online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022; FlashAttention-2, Dao 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from .. import _native

if TYPE_CHECKING:
    ArrayT = TypeVar("ArrayT")


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    bias: ArrayT | None = ...,
    return_lse: Literal[False] = ...,
    out: ArrayT | None = ...,
) -> ArrayT: ...


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    bias: ArrayT | None = ...,
    return_lse: Literal[True],
    out: ArrayT | None = ...,
) -> tuple[ArrayT, ArrayT]: ...


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Any | None = None,
    return_lse: bool = False,
    out: Any | None = None,
) -> Any:
    """Computes `softmax(scale * q k^T + bias) v` for every head.

    Forward only: tensors that require grad are refused while gradients are enabled.

    With `causal`, the last query sees all keys (bottom-right alignment, as in FlashAttention)::

        2 queries, 4 keys:  x x x .        4 queries, 2 keys:  . .
                            x x x x                            . .
                                                               x .
                                                               x x

    Args:
        q: queries, `[B, Sq, H, D]`; float32, float64, float16 or bfloat16. `D` is 1 to 1024.
        k: keys, `[B, Sk, Hkv, D]`, of q's library and dtype. `Hkv` divides `H`; head `h` of `q` reads head `h // (H / Hkv)`.
        v: values, `[B, Sk, Hkv, Dv]`, of q's library and dtype. `Dv` is 1 to 1024 and may differ from `D`.
        causal: whether query `i` sees only keys `j <= i + Sk - Sq`.
        scale: factor of the scores. Default: `D ** -0.5`.
        bias: what is added to the scaled scores, broadcastable to `[B, H, Sq, Sk]`: float32, q's dtype,
            or boolean, where False hides a key. Axes of stride 0 cost nothing.
        return_lse: whether to return the logarithm of the sum of exponentials as well.
        out: where to write the result: a PyTorch tensor or NumPy array, `[B, Sq, H, Dv]` of q's library and dtype, any strides
            with a contiguous last axis, in memory of its own.

    Inputs are read in place, read-only ones too, whatever their strides, as long as the last axis is contiguous; one that is not
    (or is misaligned, runs backwards, or is a negated view) is copied once. Only NumPy can copy for other DLPack libraries: it has
    no bfloat16.

    Returns:
        The output, `[B, Sq, H, Dv]` of q's library and dtype. With `return_lse` a pair of it and `lse`, `[B, H, Sq]`, float32
        (float64 for float64 inputs), natural logarithm. Libraries without `__array_namespace__` get NumPy arrays.

        A query that sees no key gives zeros and `lse = -inf`. A hidden key has no influence even if it or its value is NaN; NaN
        and infinities at visible places propagate as in softmax.

    Raises:
        ValueError: for shapes that do not fit, arrays on other devices, `out` that overlaps an input or is read-only.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
        NotImplementedError: for tensors that require grad while gradients are enabled, and heads wider than 1024.
        OverflowError: for sizes that cannot be indexed.
    """
    return _native.attention(q, k, v, causal=causal, scale=scale, bias=bias, return_lse=return_lse, out=out)


def scaled_dot_product_attention(
    query: ArrayT,
    key: ArrayT,
    value: ArrayT,
    attn_mask: ArrayT | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - PyTorch's signature
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002 - PyTorch's signature
) -> ArrayT:
    """`torch.nn.functional.scaled_dot_product_attention`, also for NumPy and DLPack arrays. Forward only.

    Args:
        query: `[..., H, L, E]`; float32, float64, float16 or bfloat16.
        key: `[..., H, S, E]`, of query's library and dtype.
        value: `[..., H, S, Ev]`, of query's library and dtype.
        attn_mask: broadcastable to `[..., H, L, S]`: boolean, where True takes part, or what is added to the scaled scores, of
            query's dtype or float32.
        dropout_p: must be 0.
        is_causal: whether query `i` sees only keys `j <= i`: the first query sees the first key (top-left alignment).
        scale: factor of the scores. Default: `E ** -0.5`.
        enable_gqa: whether key and value may have fewer heads, in number a divisor of query's.

    Leading axes broadcast. Inputs of rank 3 are `[H, L, E]`, of rank 2 `[L, E]`.

    Returns:
        `[..., H, L, Ev]` of query's library and dtype. A query that sees no key gives zeros.

    Raises:
        ValueError: for shapes that do not fit, a mask together with `is_causal`, arrays on other devices.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
        NotImplementedError: for dropout, and for tensors that require grad while gradients are enabled.
        OverflowError: for sizes that cannot be indexed.
    """
    out: ArrayT = _native.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return out
