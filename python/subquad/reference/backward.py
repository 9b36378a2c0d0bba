"""Gradients of exact attention by their equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .dropout import dropout_factors
from .gradients import argument_gradients, score_gradients
from .scores import by_head, scores_of
from .weights import weigh

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    wrt: Sequence[str] = ("q", "k", "v"),
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
) -> tuple[Float64, ...]:
    """`subquad.attention_backward` in float64.

    With `P = exp(score - lse)` and `delta = rowsum(do * out) - dlse`: `dscore = P * (do v^T - delta)`, and the gradient of every
    argument is the sum of `dscore` times the derivative of the scores with respect to it; `dv = P^T do`.

    Args:
        do: gradient of `out`, `[B, Sq, H, Dv]`.
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.
        out: the result of `attention`, `[B, Sq, H, Dv]`.
        lse: its log-sum-exp, `[B, H, Sq]`.
        dlse: gradient of `lse`, `[B, H, Sq]`; `None` is 0.
        wrt: names of `q`, `k`, `v`, `bias`, `relative_bias`, `alibi_slopes` and `sinks`.
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
        The gradients, in the order of `wrt`, each of the shape of its argument.
    """
    do, q, k, v, out, lse = (x.astype(np.float64) for x in (do, q, k, v, out, lse))
    heads = q.shape[2]
    with np.errstate(invalid="ignore", over="ignore"):
        products = by_head(q, heads) @ np.swapaxes(by_head(k, heads), -1, -2)
        d_weights = by_head(do, heads) @ np.swapaxes(by_head(v, heads), -1, -2)
        dot = np.moveaxis((do * out).sum(axis=-1), 2, 1)
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
    dlse = np.zeros(lse.shape) if dlse is None else dlse.astype(np.float64)
    factors = dropout_factors(products.shape, dropout_p, dropout_seed or 0) if dropout_p else None
    found = score_gradients(scores, d_weights, dot, lse, dlse, normalizer, factors)
    named = {"bias": bias, "relative_bias": relative_bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    options = {name: array for name, array in named.items() if array is not None}
    gradients = argument_gradients(found, scores, do, q, k, lse, options, weigh)
    return tuple(gradients[name]() for name in wrt)
