"""Whether a call is about numbers in memory, or about something that only PyTorch's own operators see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# None of these is public; without one, what it looks for is not found.
_interpreter = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_tracing = getattr(torch._C, "_is_tracing", lambda: False)


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
    if getattr(forward_ad, "_current_level", -1) >= 0:
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
    elif tensor.requires_grad and torch.is_grad_enabled():
        reason = "gradients are enabled (torch.no_grad() disables them)"
    return reason


def why_not_plain(tensors: Iterable[torch.Tensor]) -> str | None:
    """Returns why a computation on these tensors must be PyTorch's own, or `None` if it need not.

    Not for code that `torch.compile` traces: ask `torch.compiler.is_compiling()` before.

    Args:
        tensors: all tensors of the computation.
    """
    return _why_recorded() or next(filter(None, map(_why_not_dense, tensors)), None)
