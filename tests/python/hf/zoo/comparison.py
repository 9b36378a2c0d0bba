"""How far two runs of one model are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

TOLERANCE = 1e-4
# Tokens whose logits are closer than this, relative to the largest, are equally likely.
TIE = 1e-5


class NotApplicableError(Exception):
    """A check that a model has no use for; the message says why."""


def tensors(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what a model computed in floating point, without caches."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            # Weights are given by eager attention only.
            if not any(part in key for part in ("past_key_values", "cache", "attentions")):
                yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from tensors(value, f"{name}[{index}]")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference relative to the largest expected value; infinite for NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    # Infinite logits are what models give to tokens that they exclude.
    finite = expected.isfinite()
    if not bool((actual[~finite] == expected[~finite]).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = float((actual[finite] - expected[finite]).abs().max())
    scale = float(expected[finite].abs().max())
    return float("inf") if math.isnan(difference) else difference / max(scale, 1e-30)


def distance(actual: Any, expected: Any, *masks: torch.Tensor) -> float:
    """Returns the largest relative difference of two outputs.

    Args:
        actual: One output.
        expected: The other; differences are relative to its tensors' largest values.
        *masks: `[B, S]`, zero for padding. With masks, only tensors with a token axis of one of them are
            compared, and there only tokens.

    Raises:
        NotApplicableError: There is nothing to compare.
    """
    other = dict(tensors(actual))
    found = []
    for name, one in tensors(expected):
        if name not in other:
            return float("inf")
        mask = next((mask.bool() for mask in masks if one.shape[:2] == mask.shape), None)
        if mask is not None:
            found.append(relative(other[name][mask], one[mask]))
        elif not masks:
            found.append(relative(other[name], one))
    if not found:
        raise NotApplicableError("nothing to compare")
    return max(found)


def is_finite(output: Any) -> bool:
    """Tells whether an output has numbers, and no NaN among them."""
    found = [one for _, one in tensors(output)]
    return bool(found) and not any(bool(one.isnan().any()) for one in found)
