"""Normalizers: what becomes of the scores of a query, instead of softmax.

`subquad.attention(..., normalizer=...)` takes one of them; `None` is softmax. Each says how a score `s` becomes a weight `w`, and
whether the weights of a query are divided by their sum. The log-sum-exp that is returned is then the logarithm of that sum.

Sources: sigmoid attention, Ramapuram et al. 2024; ReLU attention, Wortsman et al. 2023 and Shen et al. 2023; squared ReLU in
gated attention units, Hua et al. 2022; softplus attention and its re-weighting, Gao and Spratling 2025; Power-Softmax,
Zimerman et al. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Normalizer", "Power", "ReLU", "Sigmoid", "Softplus"]


def _number(name: str, value: object, expected: str, *, positive: bool) -> float:
    if getattr(value, "requires_grad", False):
        raise NotImplementedError(
            f"{name}: the gradient of a normalizer's number is not implemented; pass {name}.item()"
        )
    # Booleans are numbers to Python, and strings would be parsed.
    number: float | None = None
    if not isinstance(value, (bool, str, bytes)):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = None
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


class Normalizer:
    """What every normalizer can do."""

    def _lowered(self) -> tuple[Any, ...]:
        """Returns the normalizer as the extension reads it: a name and its numbers."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """`w = 1 / (1 + exp(-(s + bias)))`, not divided by anything.

    Attributes:
        bias: a finite number. `-log(Sk)` makes the weights of random scores sum to about 1.

    Raises:
        ValueError: for a bias that is not finite.
        TypeError: for what is no number.
    """

    bias: float = 0.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(self, "bias", _number("bias", self.bias, "a finite number", positive=False))

    def _lowered(self) -> tuple[Any, ...]:
        return ("sigmoid", self.bias)


@dataclass(frozen=True)
class Softplus(Normalizer):
    """`w = log(1 + exp(s))`, divided by the sum of the weights.

    With `reweight` these divided weights `a` are weighed once more, and divided by the sum of what they become::

        w = max(n * a - 1, 0) ** reweight       for a query that sees n keys

    so that keys below the average drop out and those above it stand out (LSSAR). Queries that see up to three keys keep
    `(n * a) ** reweight`. `n` counts what `causal`, `window_size` and `mask` show, whatever `bias` hides. The paper uses
    powers of 3 and 15, queries and keys of length 1, and `length_scale[n] = log(D) * log(n)` with `scale=1`. A query none of
    whose keys is above the average has no weights: its output is 0 and its log-sum-exp `-inf`; where scores are all the same,
    rounding decides. It has no gradient.

    Attributes:
        reweight: a finite number above 0, or `None`: weights as they are.

    Raises:
        ValueError: for a power that is not finite or not above 0.
        TypeError: for what is no number.
    """

    reweight: float | None = None

    def __post_init__(self) -> None:
        """Checks the field."""
        if self.reweight is not None:
            power = _number("reweight", self.reweight, "None or a finite number above 0", positive=True)
            object.__setattr__(self, "reweight", power)

    def _lowered(self) -> tuple[Any, ...]:
        return ("softplus",) if self.reweight is None else ("softplus", self.reweight)


@dataclass(frozen=True)
class ReLU(Normalizer):
    """`w = max(s, 0) ** power`, divided by the sum of the weights unless `normalize` is off.

    A query whose scores are all 0 or below has no weights: its output is 0 and its log-sum-exp `-inf`.

    Attributes:
        power: a finite number above 0.
        normalize: whether the weights are divided by their sum.

    Raises:
        ValueError: for a power that is not finite or not above 0.
        TypeError: for what is no number, or no boolean.
    """

    power: float = 1.0
    normalize: bool = True

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(
            self, "power", _number("power", self.power, "a finite number above 0", positive=True)
        )
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize: expected a boolean, got {type(self.normalize).__name__}")

    def _lowered(self) -> tuple[Any, ...]:
        return ("relu", self.power, self.normalize)


@dataclass(frozen=True)
class Power(Normalizer):
    """`w = |s| ** power`, divided by the sum of the weights. Even powers are Power-Softmax.

    A query whose scores are all 0 has no weights: its output is 0 and its log-sum-exp `-inf`.

    Attributes:
        power: a finite number above 0.

    Raises:
        ValueError: for a power that is not finite or not above 0.
        TypeError: for what is no number.
    """

    power: float

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(
            self, "power", _number("power", self.power, "a finite number above 0", positive=True)
        )

    def _lowered(self) -> tuple[Any, ...]:
        return ("power", self.power)
