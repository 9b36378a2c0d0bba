"""Whether a kernel can read tensors, or torch records operations, so that what a foreign kernel computes would be lost."""

from __future__ import annotations

from typing import Any

import torch

# Neither is public; without them, only the public checks are made.
_mode_depth = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_functorch = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda _tensor: False
)
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_tracing(tensor: Any = None) -> bool:
    """Tells whether a computation with the tensor is being recorded, simulated or transformed.

    True within `torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func` transforms and dispatch modes
    (fake tensors, `make_fx`, counters of operations), and for subclasses of tensors, whose memory need not be
    what it seems.

    Args:
        tensor: A tensor of the computation, if there is one.
    """
    if torch.compiler.is_compiling() or _mode_depth() > 0:
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return tensor is not None and (type(tensor) not in PLAIN_TYPES or bool(_is_functorch(tensor)))


def why_unreadable(tensor: torch.Tensor, types: tuple[type, ...] = PLAIN_TYPES) -> str | None:
    """Returns why no kernel of subquad reads a tensor, `None` if one does: its type, device or dtype."""
    if type(tensor) not in types:
        return f"tensors of type {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"device {tensor.device.type}"
    if tensor.dtype not in _DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    return None
