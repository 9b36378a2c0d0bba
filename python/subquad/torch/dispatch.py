"""What calls of all operators share: how PyTorch computes them, and what autocast casts before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad.torch import library
from subquad.torch.functions import apply
from subquad.torch.operator_row import Operator, Options
from subquad.torch.plain import Route


def compute(
    operator: Operator, tensors: Sequence[Any], options: Options, way: Route, names: Sequence[str]
) -> Any:
    """Computes an operator that PyTorch has to know of.

    Args:
        operator: the operator.
        tensors: its tensors.
        options: its options.
        way: how, other than by the extension alone.
        names: those of the options that are tensors.
    """
    if way is Route.OPERATOR:
        return library.call(operator, tensors, options)
    return apply(operator, tensors, options, names)


def casts() -> bool:
    """Whether autocast is at work here; custom operators in compiled code cast themselves."""
    return not torch.compiler.is_compiling() and torch.is_autocast_enabled("cpu")


def as_cast(operator: Operator, tensors: Sequence[Any], options: Options) -> tuple[list[Any], Options]:
    """Returns the tensors and options of a call as autocast has them."""
    of_tensors = zip(operator.names, tensors, strict=True)
    cast = [library.autocast(x) if name in operator.autocast else x for name, x in of_tensors]
    given = [name for name in operator.optional if name in operator.autocast and name in options]
    return cast, options | {name: library.autocast(options[name]) for name in given}
