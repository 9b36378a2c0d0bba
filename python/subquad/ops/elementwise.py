"""Functions of single numbers and of rows that libraries have under different names, or not at all.

They take arrays of any library that `namespace_of` knows, and gradients of PyTorch flow through them.
"""

from __future__ import annotations

from typing import Any

from .namespace import namespace_of, zeros


def exp(x: Any) -> Any:
    """Returns `e^x`."""
    return namespace_of("x", x).exp(x)


def softplus(x: Any) -> Any:
    """Returns `log(1 + exp(x))`, with all its digits on both sides of 0."""
    return namespace_of("x", x).logaddexp(x, zeros(x, (), x.dtype))


def sigmoid(x: Any) -> Any:
    """Returns `1 / (1 + exp(-x))`, without an exponential above 1."""
    xp = namespace_of("x", x)
    small = xp.exp(-abs(x))
    return xp.where(x < 0, small, xp.ones_like(small)) / (1.0 + small)


def silu(x: Any) -> Any:
    """Returns `x * sigmoid(x)`."""
    return x * sigmoid(x)


def softmax(x: Any) -> Any:
    """Returns the softmax along the last axis."""
    xp = namespace_of("x", x)
    if hasattr(xp, "softmax"):
        return xp.softmax(x, -1)
    weights = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def running_maximum(x: Any) -> Any:
    """Returns the largest number so far along axis 1."""
    xp = namespace_of("x", x)
    return xp.cummax(x, 1)[0] if hasattr(xp, "cummax") else xp.maximum.accumulate(x, axis=1)


def running_logsumexp(x: Any) -> Any:
    """Returns the logarithm of the sum of exponentials so far along axis 1."""
    xp = namespace_of("x", x)
    return xp.logcumsumexp(x, 1) if hasattr(xp, "logcumsumexp") else xp.logaddexp.accumulate(x, axis=1)
