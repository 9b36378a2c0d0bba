"""Finds the modules of a model that compute attention through transformers' `AttentionInterface`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"

# All that transformers' usual eager attention refers to: scores, an added mask, softmax, dropout, values.
# Whatever else a function refers to, such as `sinks` of the module, it computes something that is not known
# here.
_ORDINARY = frozenset(
    {"F", "bool", "contiguous", "dropout", "dtype", "finfo", "float", "float32", "functional", "getattr"}
    | {"hasattr", "head_dim", "matmul", "min", "nn", "num_key_value_groups", "repeat_kv", "shape", "size"}
    | {"softmax", "tanh", "to", "torch", "training", "transpose", "type"}
)  # fmt: skip


@dataclass(frozen=True)
class Seam:
    """Where a class calls the interface.

    Attributes:
        functions: The table of implementations of its file.
        eager: What it calls for the implementation "eager".
    """

    functions: Any
    eager: Callable[..., Any] | None

    @property
    def is_ordinary(self) -> bool:
        """Whether its eager attention is `softmax(scale q k^T + mask) v`, arguments apart."""
        code = getattr(self.eager, "__code__", None)
        return code is not None and all(_ORDINARY.issuperset(one.co_names) for one in _nested(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def own_functions(cls: type) -> Iterator[FunctionType]:
    """Yields the functions of a class and its bases, without those of every module and model."""
    shared = set(PreTrainedModel.__mro__)
    for base in cls.__mro__:
        if base in shared:
            continue
        for value in vars(base).values():
            function = unwrap(getattr(value, "__func__", value)) if callable(value) else None
            if isinstance(function, FunctionType):
                yield function


def names_in(function: FunctionType) -> set[str]:
    """Returns the names of globals and attributes that a function refers to."""
    return {name for code in _nested(function.__code__) for name in code.co_names}


@lru_cache(maxsize=1024)
def _seam_of(cls: type) -> Seam | None:
    for function in own_functions(cls):
        names = names_in(function)
        if function.__name__ == "__init__" or _INTERFACE not in names:
            continue
        # The eager function is a global of the file that defines the method, which for inherited methods is
        # not the file of the class. Files with several kinds of attention give it a prefix.
        eager = [function.__globals__.get(name) for name in sorted(names) if name.endswith(_EAGER)]
        functions = function.__globals__.get(_INTERFACE, ALL_ATTENTION_FUNCTIONS)
        return Seam(functions, eager[0] if len(eager) == 1 else None)
    return None


def find_seam(module: torch.nn.Module) -> Seam | None:
    """Returns where the class of a module calls the interface, or `None` if it does not.

    A class that asks the interface only in `__init__` keeps what it got there: it cannot be patched.
    """
    return _seam_of(type(module))  # type: ignore[arg-type] # classes are hashable, whatever their instances are


def _literals(code: CodeType) -> Iterator[object]:
    for constant in code.co_consts:
        yield from constant if isinstance(constant, tuple) else (constant,)


def asks_for_sdpa(module: torch.nn.Module) -> bool:
    """Whether the code of a module's class compares the name of the implementation with "sdpa"."""
    return any(
        "sdpa" in _literals(code)
        for function in own_functions(type(module))
        if "_attn_implementation" in names_in(function)
        for code in _nested(function.__code__)
    )


def extends_masks(module: torch.nn.Module) -> bool:
    """Whether the code that calls attention looks whether a mask is a tensor, as it does where it adds keys to it."""
    return find_seam(module) is not None and any(
        {"isinstance", "Tensor"} <= names_in(function) and "attention_mask" in function.__code__.co_varnames
        for function in own_functions(type(module))
    )


def interface_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the modules of a model whose attention goes through the interface."""
    return [module for module in model.modules() if find_seam(module) is not None]


def bypassing_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the innermost modules that are attention by their name, but do not use the interface."""

    def looks_like_attention(module: torch.nn.Module) -> bool:
        name = type(module).__name__.lower()
        return not isinstance(module, PreTrainedModel) and "attention" in name

    found = []
    for module in model.modules():
        if not looks_like_attention(module) or not hasattr(type(module), "forward"):
            continue
        family = list(module.modules())
        if any(find_seam(one) is not None for one in family):
            continue
        if not any(looks_like_attention(one) for one in family[1:]):
            found.append(module)
    return found
