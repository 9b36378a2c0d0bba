"""Arguments of calls of recurrent functions: which an operator can take, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch

from subquad.hf.tracing import is_tracing, why_unreadable

Tensor = TypeVar("Tensor", torch.Tensor, torch.Tensor | None)

# How callers say that tokens of one row are of several sequences.
_PACKED = ("cu_seqlens", "cu_seq_lens_q", "seq_idx")


@dataclass
class Running:
    """A module of a patched model while its `forward` runs.

    Attributes:
        module: The module.
        inputs: What `forward` was called with.
        scans: How many sequences of several tokens it has scanned so far: one for each head, in some models.
    """

    module: Any
    inputs: tuple[Any, ...] = field(repr=False)
    scans: int = 0

    def cached_state(self) -> torch.Tensor | None:
        """Returns the state of the module's layer before this call, `None` where there is no cache or nothing in it."""
        cache = next((one for one in self.inputs if hasattr(one, "get_recurrent_state")), None)
        state: torch.Tensor | None = (
            None if cache is None else cache.get_recurrent_state(self.module.layer_idx)
        )
        return state


@lru_cache(maxsize=256)
def parameter_names(function: Any) -> tuple[str, ...] | None:
    """Returns the names of a function's parameters, apart from `**kwargs`; `None` where they are not known."""
    try:
        found = signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return tuple(one.name for one in found if one.kind is not Parameter.VAR_KEYWORD)


def why_refused(others: Mapping[str, Any], *tensors: torch.Tensor | None) -> str | None:
    """Returns why a call has to stay where it is, whichever it is.

    Args:
        others: Arguments that the operator does not get.
        *tensors: Those that it does.
    """
    present = [one for one in tensors if one is not None]
    for one in present:
        reason = why_unreadable(one)
        if reason is not None:
            return reason
        if one.numel() == 0:
            return "empty tensors"
    if any(map(is_tracing, present)):
        return "tracing"
    # Most of the functions refuse them.
    return "packed sequences" if any(others.get(name) is not None for name in _PACKED) else None


def common_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Returns the dtype that tensors are promoted to, of those that are given."""
    return reduce(torch.promote_types, (one.dtype for one in tensors if one is not None))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor whose last axis is contiguous, as operators need it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def beside(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gates and parameters in a dtype that operators take beside inputs of `dtype`."""
    if tensor is None or tensor.dtype in (dtype, wide(dtype)):
        return tensor
    return tensor.to(wide(dtype))


def inputs_of(dtype: torch.dtype, **inputs: torch.Tensor | None) -> dict[str, Any]:
    """Returns arguments by name in a dtype, `None` as it is."""
    return {name: None if one is None else one.to(dtype) for name, one in inputs.items()}


def parameters_of(dtype: torch.dtype, **parameters: torch.Tensor | None) -> dict[str, Any]:
    """Returns arguments by name as `beside` does each."""
    return {name: beside(one, dtype) for name, one in parameters.items()}


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients of any of the tensors may be asked for."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
