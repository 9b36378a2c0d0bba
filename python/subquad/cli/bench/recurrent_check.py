"""Are the results of benchmarked recurrent operators right?

Outputs and states: the first tokens of the last head or channel against the float64 oracle, which takes one after the other,
and all of them against transformers' fallback where that takes part. Gradients: in one direction for each input, against the
difference of the same operator, forward, in float64; and all of them against the fallback's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from subquad import reference
from subquad.cli.bench.recurrent_inputs import exactly
from subquad.cli.bench.recurrent_shape import RecurrentShape
from subquad.cli.bench.verify import Check

Array = npt.NDArray[Any]

# Tokens that the oracle takes, over all heads that it takes.
_TOKENS = 4096
_FEWEST_TOKENS = 16
# Letters of axes along which nothing is mixed.
_APART = "HGD"
# Of the largest number: what is added up over all tokens is as far off as it is large.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 2.4e-2}
# The fallbacks' own rounding: differences of running sums of decays, and outputs and states rounded to half types on the way.
_FALLBACK_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
# Of the length of a gradient, in a direction along all of it.
_SLOPE_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
# Small enough that next to nothing passes a kink, as normalisers have; rounding in float64 is a billionth of it.
_STEP = 1e-6
_SEED = 20_240_507


@dataclass(frozen=True)
class Results:
    """What calls give.

    Attributes:
        out: The outputs.
        state: The state after a step.
        gradients: Those of the inputs, by name.
    """

    out: Any
    state: Any | None = None
    gradients: Mapping[str, Any] | None = None

    def named(self) -> dict[str, Any]:
        """Returns all of them, by names."""
        gradients = {f"gradient of {name}": each for name, each in (self.gradients or {}).items()}
        return {"out": self.out, **({} if self.state is None else {"state": self.state}), **gradients}


def _distance(found: Array, expected: Array) -> float:
    """Returns the largest difference, as a multiple of the largest expected number."""
    # NumPy's maximum keeps a NaN, Python's may lose it.
    largest = np.max(np.abs(expected))
    return float(np.max(np.abs(found - expected)) / (largest if largest > 0 else 1.0))


@dataclass(frozen=True)
class Checker:
    """Checks results of one operator on the same inputs.

    Attributes:
        shape: What is computed, with one number of tokens.
        dtype: In which element type.
        inputs: From what, by the names of the operator's arguments.
        state: What a step continues.
        do: The gradient of the outputs, for training.
        forward: The operator as a function of its inputs.
    """

    shape: RecurrentShape
    dtype: str
    inputs: Mapping[str, Any]
    state: Any | None
    do: Any | None
    forward: Callable[[Mapping[str, Any]], Any]

    def __call__(self, found: Results, theirs: Results | None) -> Check:
        """Returns the largest distance from the oracle, and what is wrong, if anything.

        Args:
            found: Our results.
            theirs: The fallback's, if there are some.
        """
        if failure := self._malformed(found):
            return Check(float("nan"), failure)
        distances = self._oracle_distances(found)
        error = float(np.max(list(distances.values())))
        if failure := self._far(distances, _TOLERANCE, "the float64 oracle"):
            return Check(error, failure)
        ours = {name: exactly(each) for name, each in found.named().items()}
        for name, one in ours.items():
            if not np.isfinite(one).all():
                return Check(error, f"NaN or infinity in {name}")
        if failure := self._far(self._slope_distances(ours), _SLOPE_TOLERANCE, "differences of the outputs"):
            return Check(error, failure)
        if theirs is None:
            return Check(error)
        named = theirs.named()
        distances = {name: _distance(one, exactly(named[name])) for name, one in ours.items()}
        return Check(error, self._far(distances, _FALLBACK_TOLERANCE, "transformers' fallback"))

    def _malformed(self, found: Results) -> str:
        first = next(iter(self.inputs.values()))
        expected = {"out": (self.shape.axes(self.shape.kind.out), first.dtype)}
        if self.state is not None:
            expected["state"] = (tuple(self.state.shape), self.state.dtype)
        if self.do is not None:
            for name, each in self.inputs.items():
                expected[f"gradient of {name}"] = (tuple(each.shape), each.dtype)
        for name, one in found.named().items():
            size, dtype = expected[name]
            if tuple(one.shape) != size or one.dtype != dtype:
                return f"{name}: expected {size} {dtype}, got {tuple(one.shape)} {one.dtype}"
        return ""

    def _far(self, distances: Mapping[str, float], tolerance: Mapping[str, float], other: str) -> str:
        limit = tolerance[self.dtype]
        for name, distance in distances.items():
            if not distance <= limit:
                return f"{name} off by {distance:.3g} from {other} (allowed: {limit:.3g})"
        return ""

    def _part(self, axes: str) -> tuple[slice, ...]:
        """Returns the part of an array with these axes that the oracle takes."""
        heads = self.shape.sizes.get("H", 1) if self.shape.kind.varies_by_head else 1
        tokens = max(_TOKENS // heads, _FEWEST_TOKENS)
        (all_tokens,) = self.shape.tokens
        of_tokens = {letter: self.shape.axes(letter)[0] // all_tokens for letter in "TU"}
        last = slice(None) if self.shape.kind.varies_by_head else slice(-1, None)
        return tuple(
            slice(min(tokens, all_tokens) * of_tokens[letter])
            if letter in of_tokens
            else last
            if letter in _APART
            else slice(None)
            for letter in axes
        )

    def _cut(self, array: Any, axes: str) -> Array:
        """Returns that part, as the oracles have it: with tokens before heads."""
        part = exactly(array[self._part(axes)])
        return part.swapaxes(1, 2) if axes.startswith("BHT") else part

    def _oracle_distances(self, found: Results) -> dict[str, float]:
        kind = self.shape.kind
        oracle = getattr(reference.recurrent, kind.oracle)
        arrays = {
            kind.oracle_names.get(name, name): self._cut(self.inputs[name], one.axes)
            for name, one in kind.inputs.items()
        }
        if self.state is not None:
            arrays["initial_state"] = self._cut(self.state, "BHKV")
        out, state = oracle(**arrays, **kind.options)
        distances = {"out": _distance(self._cut(found.out, kind.out), out)}
        if found.state is not None:
            distances["state"] = _distance(self._cut(found.state, "BHKV"), state)
        return distances

    def _slope_distances(self, found: Mapping[str, Array]) -> dict[str, float]:
        """Returns how far gradients are from differences, each along one direction, as multiples of their lengths."""
        if self.do is None:
            return {}
        import torch

        generator = np.random.default_rng(_SEED)
        inputs = {name: torch.from_numpy(exactly(each)) for name, each in self.inputs.items()}
        upstream = self.do.double()
        distances = {}
        for name, each in inputs.items():
            direction = torch.from_numpy(generator.choice([-1.0, 1.0], tuple(each.shape)))
            low, high = (
                float((self.forward({**inputs, name: each + step * direction}) * upstream).sum())
                for step in (-_STEP, _STEP)
            )
            # Of a complex input, the direction is real.
            gradient = np.real(found[f"gradient of {name}"])
            slope, length = float((gradient * direction.numpy()).sum()), float(np.linalg.norm(gradient))
            distances[f"gradient of {name}"] = abs(slope - (high - low) / (2 * _STEP)) / (length or 1.0)
        return distances
