"""Calls that PyTorch has to know of: `torch.compile`, autocast, gradients, tensors that hold no numbers.

PyTorch is not imported for the question: where nothing has imported it, no call is its business. What has to be done is known to
`subquad.torch`, one layer up, which is imported when the first such call comes.
"""

from __future__ import annotations

import sys
from typing import Any

# What the extension raises for tensors that it must not or cannot read.
REFUSALS = (NotImplementedError, TypeError)


def is_watched() -> bool:
    """Whether PyTorch has to know of every call, whatever its arguments are: under `torch.compile` and autocast."""
    torch = sys.modules.get("torch")
    try:
        return torch is not None and (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    except AttributeError:
        # Another thread is importing it.
        return False


def is_tensor(argument: Any) -> bool:
    """Whether it is a tensor of PyTorch, so that `subquad.torch` may know how to compute what the extension refused."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(argument, torch.Tensor)


def calls() -> Any:
    """Returns the functions of `subquad.torch` that stand in for those of the extension."""
    # The only reference upwards: importing this package must not import PyTorch.
    from ..torch import calls

    return calls


def calls_at_once() -> Any:
    """Returns what `calls` does, without the half microsecond of an import.

    Not within `torch.compile`, which would compile anew when the table of modules changes.
    """
    return sys.modules.get("subquad.torch.calls") or calls()
