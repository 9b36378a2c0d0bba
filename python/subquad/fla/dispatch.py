"""Which calls are ours: those whose tensors all lie on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import update_wrapper
from itertools import chain
from typing import Any

from torch import Tensor

Function = Callable[..., Any]


def on_cpu(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether no argument is a tensor of another device."""
    return all(
        argument.device.type == "cpu"
        for argument in chain(args, kwargs.values())
        if isinstance(argument, Tensor)
    )


def chosen(original: Function, ours: Function, is_active: Callable[[], bool]) -> Function:
    """Returns a function that calls `ours` with CPU tensors as long as it is active, and `original` otherwise."""

    def function(*args: Any, **kwargs: Any) -> Any:
        return (ours if is_active() and on_cpu(args, kwargs) else original)(*args, **kwargs)

    # Attributes would say to `torch.compile` that it is the original.
    return update_wrapper(function, original, updated=())


class Backend:
    """A backend as flash-linear-attention's registry wants it: `functions` of ours by name, in front of all others."""

    backend_type = "subquad"
    priority = -1

    def __init__(self) -> None:
        """Has no functions yet."""
        self.functions: dict[str, Function] = {}

    def is_available(self) -> bool:
        """Whether it can run."""
        return True

    def is_enabled(self) -> bool:
        """Whether it may run."""
        return True

    def verify(self, function_name: str, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        """Returns whether a call is ours, and why not."""
        if function_name not in self.functions:
            return False, "subquad has no such function"
        return (True, None) if on_cpu(args, kwargs) else (False, "not all tensors are on the CPU")

    def get_implementation(self, function_name: str) -> Function | None:
        """Returns our function."""
        return self.functions.get(function_name)
