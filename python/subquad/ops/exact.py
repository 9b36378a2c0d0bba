"""Exact attention: every score that a mask shows is computed, in tiles that never leave the cache.

Sources: online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022; FlashAttention-2, Dao 2023. Windows:
Longformer, Beltagy et al. 2020; Mistral 7B, Jiang et al. 2023. Soft-cap: Gemma 2, Gemma Team 2024. ALiBi: Press et al. 2022. Sinks:
Xiao et al. 2023; as a learned logit, gpt-oss, OpenAI 2025. Relative bias: T5, Raffel et al. 2020; as a Toeplitz matrix, Shaw et al.
2018 and Luo et al. 2021. Length scale: Scalable-Softmax, Nakanishi 2025. Normalizers: see `subquad.normalizers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from .. import _native
from .pytorch import REFUSALS, calls, calls_at_once, is_tensor, is_watched

if TYPE_CHECKING:
    from ..masks import Mask
    from ..normalizers import Normalizer

    ArrayT = TypeVar("ArrayT")
    Window = tuple[int | None, int | None]


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    causal: bool = ...,
    window_size: Window | Sequence[Window] | ArrayT | None = ...,
    mask: Mask | Any | None = ...,
    scale: float | ArrayT | None = ...,
    bias: ArrayT | None = ...,
    relative_bias: ArrayT | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayT | None = ...,
    sinks: ArrayT | None = ...,
    length_scale: ArrayT | None = ...,
    normalizer: Normalizer | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | None = ...,
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
    window_size: Window | Sequence[Window] | ArrayT | None = ...,
    mask: Mask | Any | None = ...,
    scale: float | ArrayT | None = ...,
    bias: ArrayT | None = ...,
    relative_bias: ArrayT | None = ...,
    softcap: float | None = ...,
    alibi_slopes: ArrayT | None = ...,
    sinks: ArrayT | None = ...,
    length_scale: ArrayT | None = ...,
    normalizer: Normalizer | None = ...,
    dropout_p: float = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[True],
    out: ArrayT | None = ...,
) -> tuple[ArrayT, ArrayT]: ...


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: Any | None = None,
    mask: Any | None = None,
    scale: Any | None = None,
    bias: Any | None = None,
    relative_bias: Any | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    sinks: Any | None = None,
    length_scale: Any | None = None,
    normalizer: Any | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    out: Any | None = None,
) -> Any:
    """Computes `softmax(score) v` for every head; everything below composes with everything.

    Query `i` is at the position `p = i + Sk - Sq` of key `p`: the last query is at the last key (bottom-right alignment, as in
    FlashAttention). The score of query `i` and key `j` is built in this order::

        score = scale * (q_i . k_j)
        score = softcap * tanh(score / softcap)         with softcap
        score = score - alibi_slopes[h] * |p - j|       with alibi_slopes
        score = score + bias[b, h, i, j]                with a bias of numbers
        score = score + relative_bias[h, j - i + Sq - 1]

    A key is seen if `causal`, `window_size`, `mask` and `bias` all show it. What `causal`, `window_size` and `mask` hide is not
    computed. `causal` alone, `window_size=(1, 0)`, and `window_size=(1, 1)`::

        2 queries, 4 keys:  x x x .     . x x .     . x x x
                            x x x x     . . x x     . . x x

        4 queries, 2 keys:  . .         . .         . .
                            . .         . .         x .
                            x .         x .         x x
                            x x         x x         x x

    PyTorch differentiates it with respect to `q`, `k`, `v`, a `bias` of numbers, `relative_bias`, `alibi_slopes` and `sinks`;
    `lse` has a gradient, too. In float32 and float64, without `softcap`, `normalizer` and dropout, there are second derivatives
    and forward mode (`create_graph=True`, `torch.func.hessian`, `jvp`) for all but slopes and sinks. `torch.compile`,
    `torch.export` and `torch.func` see one operator, `subquad::attention`. Under autocast `q`, `k`, `v` and `bias` are cast as
    PyTorch's own function casts them. Without PyTorch, see `subquad.attention_backward`.

    Args:
        q: queries, `[B, Sq, H, D]`; float32, float64, float16 or bfloat16. `D` is 1 to 1024.
        k: keys, `[B, Sk, Hkv, D]`, of q's library and dtype. `Hkv` divides `H`; head `h` of `q` reads head `h // (H / Hkv)`.
        v: values, `[B, Sk, Hkv, Dv]`, of q's library and dtype. `Dv` is 1 to 1024 and may differ from `D`.
        causal: whether query `i` sees only keys `j <= p`.
        window_size: `(left, right)`: query `i` sees only keys `p - left <= j <= p + right`. Each side is an integer from 0, or
            `None` for unbounded. Or one window for each head: a sequence of `H` such pairs, or an integer array `[H, 2]` (int32 or
            int64), in which -1 is unbounded. With `causal` the right side is at most 0.
        mask: an object of `subquad.masks`.
        scale: factor of the scores: a number, or an array that broadcasts to `[B, H, Sq]` (`[H, 1]` for each head, `[Sq]` for each
            query), of float32, float64 or q's dtype. Default: `D ** -0.5`.
        bias: what is added to the scores, broadcastable to `[B, H, Sq, Sk]`: float32, q's dtype, or boolean, where False hides a
            key (as does `-inf`). Axes of stride 0 cost nothing.
        relative_bias: what is added by the distance of key and query, `[H, Sq + Sk - 1]`, or `[1, Sq + Sk - 1]` for all heads;
            float32 or q's dtype. `subquad.biases` makes them.
        softcap: a finite number above 0 that scaled scores stay within.
        alibi_slopes: slopes of ALiBi, `[H]` or `[B, H]`, float32 (with float64 inputs also float64).
        sinks: a logit that takes part in the sum of exponentials and has no value: one for each head, `[H]`, or an array of rank 2
            or 3 that broadcasts to `[B, H, Sq]`; float32 or q's dtype. `lse` includes it. `-inf` is no sink.
        length_scale: `[Sk + 1]`, float32, float64 or q's dtype: the scale of a query that sees `n` keys by `causal`, `window_size`
            and `mask` (whatever `bias` hides) is multiplied by `length_scale[n]`.
        normalizer: an object of `subquad.normalizers` in the place of softmax. Not together with `sinks`.
        dropout_p: each weight becomes 0 with this probability, from 0 to below 1, and the others are divided by `1 - dropout_p`, on
            the way to the output; `lse` is of all of them. Which ones follows from `dropout_seed` and the places of query and key
            alone (Philox, Salmon et al. 2011).
        dropout_seed: an integer from 0 to below `2**64`, needed for `dropout_p` above 0. Without one, calls on tensors draw it from
            PyTorch's generator (`torch.manual_seed`), but not within `torch.compile`.
        return_lse: whether to return the logarithm of the sum of exponentials (of weights, with a normalizer) as well.
        out: where to write the result: a PyTorch tensor or NumPy array, `[B, Sq, H, Dv]` of q's library and dtype, any strides
            with a contiguous last axis, in memory of its own.

    Arrays are of q's library. Inputs are read in place, read-only ones too, whatever their strides, as long as the last axis is
    contiguous; one that is not (or is misaligned, runs backwards, or is a negated view) is copied once. Only NumPy can copy for
    other DLPack libraries: it has no bfloat16.

    Returns:
        The output, `[B, Sq, H, Dv]` of q's library and dtype. With `return_lse` a pair of it and `lse`, `[B, H, Sq]`, float32
        (float64 for float64 inputs), natural logarithm. Libraries without `__array_namespace__` get NumPy arrays.

        A query that sees no key gives zeros and `lse = -inf` (with a sink, the sink). A hidden key has no influence even if it or
        its value is NaN; NaN and infinities at visible places propagate as in softmax.

    Raises:
        ValueError: for shapes that do not fit, negative windows, a soft-cap that is not finite and above 0, a normalizer with
            sinks, arrays on other devices, `out` that overlaps an input or is read-only.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, masks, or normalizers, windows of
            another kind, mixed libraries.
        NotImplementedError: for heads wider than 1024; for gradients of `scale`, `length_scale` and what is no tensor; for higher
            derivatives that are not implemented; for what `torch.compile` cannot carry.
        RuntimeError: for `out` together with tensors that require grad while gradients are enabled.
        OverflowError: for sizes that cannot be indexed.
    """
    mask, normalizer = _lowered(mask), _lowered(normalizer)
    watched = is_watched()
    draws_seed = dropout_seed is None and dropout_p and is_tensor(q)
    # A tensor converts to the number that is expected here, and would lose its gradient. What requires grad the extension would
    # refuse, which takes 2 microseconds.
    differentiated = (
        getattr(q, "requires_grad", False)
        or getattr(k, "requires_grad", False)
        or getattr(v, "requires_grad", False)
    )
    if not (watched or draws_seed or differentiated) and (softcap is None or not is_tensor(softcap)):
        try:
            return _native.attention(
                q,
                k,
                v,
                causal=causal,
                window_size=window_size,
                mask=mask,
                scale=scale,
                bias=bias,
                relative_bias=relative_bias,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                length_scale=length_scale,
                normalizer=normalizer,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                return_lse=return_lse,
                out=out,
            )
        except REFUSALS:
            if not is_tensor(q):
                raise
    options = {
        "causal": causal,
        "window_size": window_size,
        "mask": mask,
        "scale": scale,
        "bias": bias,
        "relative_bias": relative_bias,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "length_scale": length_scale,
        "normalizer": normalizer,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }
    compute = calls().attention if watched else calls_at_once().attention_as_it_is
    return compute(q, k, v, options, return_lse=return_lse, out=out)


def _lowered(description: Any) -> Any:
    """Returns a mask or normalizer in the form that the extension reads; what is neither is its to refuse."""
    # A class has the method, too, and cannot be asked.
    is_description = hasattr(description, "_lowered") and not isinstance(description, type)
    return description._lowered() if is_description else description


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
    """`torch.nn.functional.scaled_dot_product_attention`, also for NumPy and DLPack arrays.

    PyTorch differentiates it, and `torch.compile` sees `subquad::attention`: see `subquad.attention`.

    Args:
        query: `[..., H, L, E]`; float32, float64, float16 or bfloat16.
        key: `[..., H, S, E]`, of query's library and dtype.
        value: `[..., H, S, Ev]`, of query's library and dtype.
        attn_mask: broadcastable to `[..., H, L, S]`: boolean, where True takes part, or what is added to the scaled scores, of
            query's dtype or float32.
        dropout_p: see `subquad.attention`; its seed comes from PyTorch's generator, so that it must be 0 for other arrays.
        is_causal: whether query `i` sees only keys `j <= i`: the first query sees the first key (top-left alignment).
        scale: factor of the scores. Default: `E ** -0.5`.
        enable_gqa: whether key and value may have fewer heads, in number a divisor of query's.

    Leading axes broadcast. Inputs of rank 3 are `[H, L, E]`, of rank 2 `[L, E]`.

    Returns:
        `[..., H, L, Ev]` of query's library and dtype. A query that sees no key gives zeros.

    Raises:
        ValueError: for shapes that do not fit, a mask together with `is_causal`, arrays on other devices.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
        NotImplementedError: for dropout in arrays that are no tensors, and the derivatives that `subquad.attention` has not.
        OverflowError: for sizes that cannot be indexed.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out: ArrayT
    if not is_watched():
        try:
            out = _native.scaled_dot_product_attention(*arguments)
        except REFUSALS:
            if not is_tensor(query):
                raise
        else:
            return out
    out = calls().scaled_dot_product_attention(*arguments)
    return out
