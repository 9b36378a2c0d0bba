"""Gradients of exact attention, for those who have no autograd.

Sources: FlashAttention, Dao et al. 2022; FlashAttention-2, Dao 2023: probabilities are computed anew from the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .. import _native
from .exact import _lowered

if TYPE_CHECKING:
    from ..masks import Mask
    from ..normalizers import Normalizer

    ArrayT = TypeVar("ArrayT")
    Window = tuple[int | None, int | None]


def attention_backward(
    do: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: ArrayT,
    *,
    dlse: ArrayT | None = None,
    wrt: Sequence[str] = ("q", "k", "v"),
    causal: bool = False,
    window_size: Window | Sequence[Window] | ArrayT | None = None,
    mask: Mask | Any | None = None,
    scale: float | ArrayT | None = None,
    bias: ArrayT | None = None,
    relative_bias: ArrayT | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayT | None = None,
    sinks: ArrayT | None = None,
    length_scale: ArrayT | None = None,
    normalizer: Normalizer | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
) -> tuple[ArrayT, ...]:
    """Returns the gradients of `out, lse = attention(q, k, v, ..., return_lse=True)`.

    With `P = exp(score - lse)` and `delta = rowsum(do * out) - dlse`::

        dscore = P * (do v^T - delta)
        dv = P^T do,    dq = dscore (dscore / d(q k^T)) k,    dk likewise

    What is not given again must be as it was: all arguments from `causal` on are those of the call. Nothing of the size of the
    scores is kept: memory is linear in the lengths.

    Args:
        do: gradient of `out`, `[B, Sq, H, Dv]`, of q's library and dtype.
        q: as `attention` had it, `[B, Sq, H, D]`.
        k: as `attention` had it, `[B, Sk, Hkv, D]`.
        v: as `attention` had it, `[B, Sk, Hkv, Dv]`.
        out: the result, `[B, Sq, H, Dv]`.
        lse: the log-sum-exp, `[B, H, Sq]`, float32 (float64 for float64 inputs).
        dlse: gradient of `lse`, of its shape and dtype, if `lse` was used.
        wrt: the names of the arguments whose gradients are wanted: of `q`, `k`, `v`, `bias`, `relative_bias`, `alibi_slopes` and
            `sinks`, each at most once. The gradients of `bias`, `relative_bias` and `alibi_slopes` take another pass each.
        causal: see `attention`, also for the arguments that follow.
        window_size: see there.
        mask: see there.
        scale: see there.
        bias: see there.
        relative_bias: see there.
        softcap: see there.
        alibi_slopes: see there.
        sinks: see there.
        length_scale: see there.
        normalizer: see there.
        dropout_p: see there.
        dropout_seed: see there.

    Returns:
        The gradients, in the order of `wrt`, each of the shape and dtype of its argument; summed where that is broadcast, and over
        the query heads that share a key/value head. What a mask hides gets no gradient, whatever it is; a query that sees no key
        gets zeros.

    Raises:
        ValueError: as `attention`; for names in `wrt` that are unknown, given twice or of arguments that are not given.
        TypeError: as `attention`; for `do`, `out`, `lse` or `dlse` of another dtype, and the gradient of a boolean bias.
        NotImplementedError: as `attention`.
    """
    options = {
        "causal": causal,
        "window_size": window_size,
        "mask": _lowered(mask),
        "scale": scale,
        "bias": bias,
        "relative_bias": relative_bias,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "length_scale": length_scale,
        "normalizer": _lowered(normalizer),
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }
    gradients: tuple[ArrayT, ...] = _native.attention_backward(
        do, q, k, v, out, lse, dlse, list(wrt), options
    )
    return gradients


def attention_varlen_backward(
    do: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    out: ArrayT,
    lse: ArrayT,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    dlse: ArrayT | None = None,
    wrt: Sequence[str] = ("q", "k", "v"),
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: ArrayT | None = None,
    sinks: ArrayT | None = None,
) -> tuple[ArrayT, ...]:
    """Returns the gradients of `out, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, ..., return_lse=True)`.

    The formulas are those of `attention_backward`, within each sequence. There are none for caches in pages.

    Args:
        do: gradient of `out`, `[total_q, H, Dv]`, of q's library and dtype.
        q: as `attention_varlen` had it, `[total_q, H, D]`.
        k: as `attention_varlen` had it, `[total_k, Hkv, D]`.
        v: as `attention_varlen` had it, `[total_k, Hkv, Dv]`.
        out: the result, `[total_q, H, Dv]`.
        lse: the log-sum-exp, `[H, total_q]`, float32 (float64 for float64 inputs).
        cu_seqlens_q: cumulative lengths of the queries, `[B + 1]`.
        cu_seqlens_k: cumulative lengths of the keys, `[B + 1]`.
        dlse: gradient of `lse`, of its shape and dtype, if `lse` was used.
        wrt: the names of the arguments whose gradients are wanted: of `q`, `k`, `v`, `alibi_slopes` and `sinks`, each at most once.
        softmax_scale: see `attention_varlen`, also for the arguments that follow.
        causal: see there.
        window_size: see there.
        softcap: see there.
        alibi_slopes: see there.
        sinks: see there.

    Returns:
        The gradients, in the order of `wrt`, each of the shape and dtype of its argument. A token of an empty partner (queries
        without keys, keys without queries) gets zeros.

    Raises:
        ValueError: as `attention_varlen`; for names in `wrt` that are unknown, given twice or of arguments that are not given.
        TypeError: as `attention_varlen`; for `do`, `out`, `lse` or `dlse` of another dtype.
        NotImplementedError: as `attention_varlen`.
    """
    gradients: tuple[ArrayT, ...] = _native.attention_varlen_backward(
        do,
        q,
        k,
        v,
        out,
        lse,
        dlse,
        cu_seqlens_q,
        cu_seqlens_k,
        list(wrt),
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        sinks,
    )
    return gradients
