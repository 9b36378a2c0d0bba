"""From the gradients of attention's results to those of its arguments, in the arithmetic of the arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .scores import Scores, by_diagonal, by_head, distances, per_head, sink_logits
from .weights import rates_of, weights_of

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]
Weigh = Callable[[Array, Bool, Array], Array]
"""The sums of visible rows `[..., K, D]` under weights `[..., Q, K]`, given weights, visibility `[..., Q, K]` and rows."""


class ScoreGradients(NamedTuple):
    """What becomes of scores `[B, H, Sq, Sk]` in the gradients."""

    weights: Array
    """What the values are multiplied by."""
    d_scores: Array
    """The gradient of every score."""
    delta: Array
    """What the gradient of a weight is compared with, `[B, H, Sq, 1]`."""


def score_gradients(
    scores: Scores,
    d_weights: Array,
    dot: Array,
    lse: Array,
    dlse: Array,
    normalizer: Any | None,
    factors: Array | None = None,
) -> ScoreGradients:
    """Returns the weights and the gradients of the scores; 0 where nothing is visible.

    Args:
        scores: those of the call.
        d_weights: `do v^T`, `[B, H, Sq, Sk]`.
        dot: `rowsum(do * out)`, `[B, H, Sq]`.
        lse: the log-sum-exp, `[B, H, Sq]`.
        dlse: its gradient, `[B, H, Sq]`.
        normalizer: that of the call.
        factors: of the weights on the way to the result, `[B, H, Sq, Sk]`, or `None`.
    """
    blind = np.isneginf(lse)
    base, dlse = np.where(blind, 0, lse)[..., None], np.where(blind, 0, dlse)[..., None]
    # A query without a key has the output 0 whatever else there is: NaN in its gradient counts for nothing.
    dot = np.where(scores.visible.any(axis=-1), dot, 0)[..., None]
    seen = scores.visible & ~blind[..., None]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if normalizer is None:
            weights = rates = np.exp(scores.values - base)
            delta = dot - dlse
        else:
            weights, is_divided = weights_of(scores.values, scores.visible, normalizer, scores.counts)
            rates, share = rates_of(scores.values, normalizer), np.exp(-base)
            if is_divided:
                weights, rates, delta = weights * share, rates * share, dot - dlse
            else:
                delta = -dlse * share
        d_scores = rates * ((d_weights if factors is None else factors * d_weights) - delta)
        weights = weights if factors is None else weights * factors
    return ScoreGradients(np.where(seen, weights, 0), np.where(seen, d_scores, 0), delta)


def argument_gradients(
    found: ScoreGradients,
    scores: Scores,
    do: Array,
    q: Array,
    k: Array,
    lse: Array,
    options: Mapping[str, Array],
    weigh: Weigh,
) -> dict[str, Callable[[], Array]]:
    """Returns how to compute the gradient of each argument, by its name.

    Args:
        found: the gradients of the scores.
        scores: those of the call.
        do: `[B, Sq, H, Dv]`.
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`.
        lse: the log-sum-exp, `[B, H, Sq]`.
        options: those of `bias`, `relative_bias`, `alibi_slopes` and `sinks` that are given.
        weigh: how sums are formed.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    shape, visible, dtype = scores.values.shape, scores.visible, found.d_scores.dtype
    with np.errstate(invalid="ignore"):
        d_products = np.where(visible, found.d_scores * scores.slopes, 0)

    def of_keys(weights: Array, rows: Array) -> Array:
        rows = by_head(rows, heads)
        sums = weigh(np.swapaxes(weights, -1, -2), np.swapaxes(visible, -1, -2), rows)
        group = heads // kv_heads if kv_heads else 1
        shared = sums.reshape(sums.shape[0], kv_heads, group, *sums.shape[2:]).sum(axis=2)
        return np.moveaxis(shared, 1, 2)

    def summed(name: str, terms: Array, read: Callable[[Array], Array]) -> Array:
        # Where the call reads an entry, its gradient is added.
        places = np.arange(options[name].size).reshape(options[name].shape)
        sums = np.zeros(places.size, dtype)
        np.add.at(sums, np.broadcast_to(read(places), terms.shape), terms)
        return sums.reshape(places.shape)

    def of_sinks() -> Array:
        sinks = sink_logits(options["sinks"], shape[:3], dtype)
        with np.errstate(invalid="ignore"):
            terms = np.where(np.isneginf(sinks), 0, -np.exp(sinks - lse[..., None]) * found.delta)
        return summed("sinks", terms, lambda at: sink_logits(at, shape[:3], int))

    def of_slopes() -> Array:
        terms = -distances(shape, dtype) * found.d_scores
        return summed("alibi_slopes", terms, lambda at: per_head(at, shape, int))

    return {
        "q": lambda: np.moveaxis(weigh(d_products, visible, by_head(k, heads)), 1, 2),
        "k": lambda: of_keys(d_products, q),
        "v": lambda: of_keys(found.weights, do),
        "bias": lambda: summed("bias", found.d_scores, lambda at: at),
        "relative_bias": lambda: summed(
            "relative_bias", found.d_scores, lambda at: by_diagonal(at, shape, int)
        ),
        "alibi_slopes": of_slopes,
        "sinks": of_sinks,
    }
