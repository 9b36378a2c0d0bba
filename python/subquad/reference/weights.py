"""How scores become weights and weights a result."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

FEW_KEYS = 3
"""Re-weighting spares queries that see up to so many keys."""


def weights_of(
    scores: Array, visible: Bool, normalizer: Any, counts: npt.NDArray[np.int64]
) -> tuple[Array, bool]:
    """Returns the weights that a normalizer other than softmax gives to scores, and whether they are divided by their sum.

    Hidden keys have the weight 0.

    Args:
        scores: `[..., Q, K]`, of the dtype in which to compute.
        visible: `[..., Q, K]`.
        normalizer: an object of `subquad.normalizers`.
        counts: how many keys a query sees, biases aside, `[..., Q, 1]`.
    """
    zero = scores.dtype.type(0)
    weights, is_divided = _weights_of_scores(scores, normalizer)
    weights = np.where(visible, weights, zero)
    match normalizer._lowered():
        case ("softplus", power):
            total = weights.sum(axis=-1, keepdims=True, dtype=scores.dtype)
            shares = np.where(total == 0, zero, weights / total) * counts.astype(scores.dtype)
            lifted = np.maximum(shares - (counts > FEW_KEYS), zero)
            weights = np.where(visible, lifted ** scores.dtype.type(power), zero).astype(scores.dtype)
    return weights, is_divided


def _weights_of_scores(scores: Array, normalizer: Any) -> tuple[Array, bool]:
    """Returns what a normalizer makes of each score by itself, and whether it is divided."""
    one = scores.dtype.type(1)
    match normalizer._lowered():
        case ("sigmoid", bias):
            return one / (one + np.exp(-(scores + scores.dtype.type(bias)))), False
        case ("softplus", *_):
            return np.logaddexp(scores.dtype.type(0), scores), True
        case ("relu", power, normalize):
            return np.maximum(scores, 0) ** scores.dtype.type(power), normalize
        case ("power", power):
            return np.abs(scores) ** scores.dtype.type(power), True
        case lowered:
            raise ValueError(f"normalizer: expected one that has a definition here, got {lowered[0]}")


def rates_of(scores: Array, normalizer: Any) -> Array:
    """Returns the derivatives of the weights of `weights_of` with respect to the scores; 0 at the kink of ReLU and of `|s|`."""
    one = scores.dtype.type(1)
    match normalizer._lowered():
        case ("sigmoid", bias):
            weights: Array = one / (one + np.exp(-(scores + scores.dtype.type(bias))))
            rates: Array = weights * (one - weights)
            return rates
        case ("softplus",):
            rates = one / (one + np.exp(-scores))
            return rates
        case ("relu", power, _):
            power = scores.dtype.type(power)
            return np.where(scores <= 0, 0, power * np.abs(scores) ** (power - one))
        case ("power", power):
            power = scores.dtype.type(power)
            return np.where(scores == 0, 0, power * np.abs(scores) ** (power - one) * np.sign(scores))
        case lowered:
            raise ValueError(f"normalizer: expected one that has a derivative here, got {lowered[0]}")


def weigh(weights: Float64, visible: Bool, values: Float64) -> Float64:
    """Returns the weighted sum of the visible `values` `[..., K, D]` under `weights` `[..., Q, K]`."""
    # A hidden value must not count, and 0 * inf is NaN: rows that see every non-finite value multiply it, others drop it.
    out = weights @ np.where(np.isfinite(values), values, 0.0)
    for place in np.argwhere(~np.isfinite(values).all(axis=-1)):
        *stack, key = place
        row = values[(*stack, key)]
        seen = visible[(*stack, slice(None), key)]
        with np.errstate(invalid="ignore"):
            extra = weights[(*stack, slice(None), key)][..., None] * np.where(np.isfinite(row), 0.0, row)
        out[tuple(stack)] += np.where(seen[..., None], extra, 0.0)
    return out


def softmax(
    scores: Float64,
    visible: Bool,
    values: Float64,
    sinks: Float64 | None = None,
    factors: Float64 | None = None,
) -> tuple[Float64, Float64]:
    """Returns the mean of the visible values under the softmax of their scores, and the log-sum-exp.

    Args:
        scores: `[..., Q, K]`.
        visible: `[..., Q, K]`.
        values: `[..., K, D]`.
        sinks: a further logit of each query, without a value: `[..., Q, 1]`, or `None`.
        factors: of the weights on the way to the result, `[..., Q, K]`, or `None`.

    Returns:
        `[..., Q, D]` and `[..., Q]`. Where nothing is visible, 0 and the sink (without one, `-inf`).
    """
    scores = np.where(visible, scores, -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    peak = peak if sinks is None else np.maximum(peak, sinks)
    base = np.where(np.isneginf(peak), 0.0, peak)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weights = np.where(visible, np.exp(scores - base), 0.0)
        total = weights.sum(axis=-1, keepdims=True)
        total = total if sinks is None else total + np.exp(sinks - base)
        lse = base + np.log(total)
        out = weigh(weights if factors is None else weights * factors, visible, values)
        out = np.where(total == 0.0, 0.0, out / np.where(total == 0.0, 1.0, total))
    return out, lse[..., 0]


def normalized(
    scores: Float64,
    visible: Bool,
    values: Float64,
    normalizer: Any,
    counts: npt.NDArray[np.int64],
    factors: Float64 | None = None,
) -> tuple[Float64, Float64]:
    """Returns the sum of the visible values under the weights of a normalizer, and the logarithm of the sum of weights.

    Args:
        scores: `[..., Q, K]`.
        visible: `[..., Q, K]`.
        values: `[..., K, D]`.
        normalizer: an object of `subquad.normalizers`.
        counts: how many keys a query sees, biases aside, `[..., Q, 1]`.
        factors: of the weights on the way to the result, `[..., Q, K]`, or `None`.

    Returns:
        `[..., Q, D]` and `[..., Q]`. Where the weights sum to nothing, 0 and `-inf`.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        weights, divided = weights_of(scores, visible, normalizer, counts)
        total = weights.sum(axis=-1, keepdims=True)
        out = weigh(weights if factors is None else weights * factors, visible, values)
        if divided:
            out = np.where(total == 0.0, 0.0, out / np.where(total == 0.0, 1.0, total))
        return out, np.log(total)[..., 0]
