"""Whether a call is about numbers in memory, or about something that only PyTorch's own operators see."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Any

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# None of these is public; without one, what it looks for is not found.
_interpreter = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_tracing = getattr(torch._C, "_is_tracing", lambda: False)
_transform_type: Any = getattr(getattr(torch._C, "_functorch", None), "TransformType", None)


def active_transform() -> Any:
    """Returns the innermost transform of `torch.func` that is at work, or `None`."""
    return _interpreter()


class Route(Enum):
    """What has to compute a call."""

    EXTENSION = auto()
    """The extension: there are numbers, and the result has no derivative."""
    AUTOGRAD = auto()
    """A `torch.autograd.Function`: the result has a derivative."""
    OPERATOR = auto()
    """A custom operator: PyTorch records the call, or the tensors hold no numbers."""


def route(arguments: Iterable[Any]) -> Route:
    """Returns what has to compute a call.

    Args:
        arguments: its tensors, and anything else.
    """
    if torch.compiler.is_compiling():
        return Route.OPERATOR
    interpreter = _interpreter()
    if interpreter is not None:
        # `torch.func.functionalize` knows operators only.
        is_functionalized = interpreter.key() == _transform_type.Functionalize
        return Route.OPERATOR if is_functionalized else Route.AUTOGRAD
    if _dispatch_modes() > 0:
        return Route.OPERATOR
    requires_grad = False
    for one in arguments:
        if type(one) in _PLAIN:
            requires_grad = requires_grad or one.requires_grad
        elif one is not None and isinstance(one, torch.Tensor):
            # The extension says that it reads no nested tensors.
            return Route.EXTENSION if one.is_nested else Route.OPERATOR
    if (requires_grad and torch.is_grad_enabled()) or _has_tangent(arguments):
        return Route.AUTOGRAD
    return Route.EXTENSION


def holds_numbers(arguments: Iterable[Any]) -> bool:
    """Whether no tensor is fake, of a subclass, or recorded by a dispatch mode: their operators are for PyTorch to see.

    Args:
        arguments: tensors, and anything else.
    """
    return _dispatch_modes() == 0 and all(
        type(one) in _PLAIN or not isinstance(one, torch.Tensor) for one in arguments
    )


def _tangent(tensor: torch.Tensor) -> torch.Tensor | None:
    tangent: torch.Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def is_forward_mode() -> bool:
    """Whether there is a level of forward-mode differentiation, without which no tensor carries a tangent."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def _has_tangent(arguments: Iterable[Any]) -> bool:
    return is_forward_mode() and any(
        isinstance(one, torch.Tensor) and _tangent(one) is not None for one in arguments
    )


def _why_recorded() -> str | None:
    """Returns who watches PyTorch's operators in this thread and would miss one that is not PyTorch's."""
    if _dispatch_modes() > 0:
        return "a torch dispatch mode is active (fake tensors, make_fx, counters of operations)"
    if _function_modes() > 0:
        return "a torch function mode is active"
    if _interpreter() is not None:
        return "a torch.func transform is active"
    if _is_tracing():
        return "torch.jit.trace is active"
    # Dual tensors look like others: their tangent would be lost.
    if is_forward_mode():
        return "forward-mode differentiation is active"
    return None


def _why_not_dense(tensor: torch.Tensor) -> str | None:
    """Returns what keeps a tensor's elements from being plain numbers in the CPU's memory."""
    reason = None
    if type(tensor) not in _PLAIN:
        reason = f"type {type(tensor).__name__}"
    elif not tensor.is_cpu:
        reason = f"device {tensor.device.type}"
    elif tensor.is_nested:
        reason = "nested tensors"
    elif tensor.layout != torch.strided:
        reason = f"layout {str(tensor.layout).removeprefix('torch.')}"
    elif tensor.is_neg():
        reason = "a negated view"
    return reason


def why_not_plain(tensors: Iterable[torch.Tensor]) -> str | None:
    """Returns why a computation on these tensors must be PyTorch's own, or `None` if it need not.

    Not for code that `torch.compile` traces: ask `torch.compiler.is_compiling()` before.

    Args:
        tensors: all tensors of the computation.
    """
    return _why_recorded() or next(filter(None, map(_why_not_dense, tensors)), None)
