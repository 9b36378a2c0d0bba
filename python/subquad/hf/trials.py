"""Trials: whether what stands in for a layer or a method gives what that gives."""

from __future__ import annotations

from typing import Any

import torch

# Bfloat16 results of chunks and of steps are rounded differently.
_TOLERANCE = 0.02


def sines(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Returns an example of inputs. It takes no random numbers: the sequence that a user has seeded stays the same."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64).sin().view(shape).to(like.dtype)


def same_results(actual: Any, expected: Any) -> bool:
    """Whether two results, tensors or tuples of them, have the same tensors up to rounding, and have some."""
    found, wanted = _tensors(actual), _tensors(expected)
    return len(found) == len(wanted) > 0 and all(map(_is_close, found, wanted))


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [one for part in result for one in _tensors(part)] if isinstance(result, tuple) else []


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    difference, largest = (actual - expected).abs().max(), expected.abs().max()
    return bool(difference <= _TOLERANCE * largest)
