"""What PyTorch has to know of an operator: a row of the table in `subquad.torch.table`.

A call consists of tensors that are always there and of options by name, some of which may be tensors, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Options = dict[str, Any]


def _after_results(
    gradients: Sequence[Any], results: Sequence[Any], tensors: Sequence[Any], _options: Options
) -> Sequence[Any]:
    return (*gradients, *results, *tensors)


def of_others_than_last(
    gradients: Sequence[Any], results: Sequence[Any], tensors: Sequence[Any], _options: Options
) -> Sequence[Any]:
    """A `derivative_call` of rows whose last result is there for the derivative alone, and has no gradient."""
    return (*gradients[:-1], *results, *tensors)


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        name: the name, after `subquad::`.
        tensors: the tensors that are always there. Where a name ends with `?`, there may be `None`.
        optional: the options that may be tensors.
        others: all options that may be something else, with their types in a schema.
        differentiable: the tensors and options that have a gradient.
        returns: the schema of the results.
        compute: computes the results from tensors and options, on numbers in memory.
        fake: makes tensors like the results from tensors and options.
        derivative: the row that computes the gradients, if there is one; one of its options is `wrt`: the names of the gradients
            that are wanted.
        kept: the numbers of the results that it takes, `None` for all. The others are not kept for it, and may be changed in place.
        derivative_call: makes the tensors of a call of that row from the gradients of the results (`None` where there is none), the
            results that are kept, the tensors and the options.
        missing: what is asked for in vain where there is no such row.
        follows: the tensors that the others determine: what gradients they have is part of those of the others.
        autocast: the tensors and options that autocast casts.
        forward_mode: computes the tangents of the results from tensors, options, tangents by name, and what computes rows; `None`
            where there are none.
    """

    name: str
    tensors: tuple[str, ...]
    optional: tuple[str, ...]
    others: dict[str, str]
    differentiable: frozenset[str]
    returns: str
    compute: Callable[[Sequence[Any], Options], Any]
    fake: Callable[[Sequence[Any], Options], Any]
    derivative: Operator | None
    missing: str
    kept: tuple[int, ...] | None = None
    derivative_call: Callable[..., Sequence[Any]] = _after_results
    follows: frozenset[str] = frozenset()
    # As of PyTorch's own attention.
    autocast: frozenset[str] = frozenset({"q", "k", "v", "bias"})
    forward_mode: Callable[..., Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(name.rstrip("?") for name in self.tensors)

    def results_kept(self, results: Sequence[Any]) -> Sequence[Any]:
        """Returns the results that are kept for the derivative."""
        return results if self.kept is None else [results[number] for number in self.kept]

    def tensors_among(self, options: Options) -> list[str]:
        """Returns the names of the options that are tensors in a call."""
        # Whether something is a tensor is a slow question.
        given = [(name, options[name]) for name in self.optional if options[name] is not None]
        return [name for name, value in given if isinstance(value, torch.Tensor)] if given else []

    def wanted(self, names: Sequence[str], needed: Sequence[bool]) -> list[str]:
        """Returns the names of the gradients that have to be computed.

        Args:
            names: tensors and options.
            needed: whether the gradient of each is asked for.
        """
        return [name for name, needs in zip(names, needed, strict=True) if needs and name not in self.follows]

    def derivative_for(self, names: Sequence[str]) -> Operator:
        """Returns the row that computes the gradients of these arguments.

        Raises:
            NotImplementedError: there is none, or one of them has no gradient.
        """
        if self.derivative is None:
            raise NotImplementedError(f"subquad::{self.name}: {self.missing}")
        for name in names:
            if name not in self.differentiable:
                raise NotImplementedError(f"subquad::{self.name}: the gradient of {name} is not implemented")
        return self.derivative

    def refuse_forward_mode(self) -> NotImplementedError:
        """Returns the error of forward-mode differentiation."""
        return NotImplementedError(
            f"subquad::{self.name}: forward-mode derivatives (jvp) are not implemented; use reverse mode "
            "(torch.func.vjp, Tensor.backward)"
        )


NO_SECOND = "second derivatives (create_graph=True, torch.func.hessian) are not implemented"
WRT = {"wrt": "str[]"}


def fake_gradients(arguments: Options) -> Any:
    """Returns tensors like those that are wanted, from tensors and options by name."""
    return [arguments[name].new_empty(arguments[name].shape) for name in arguments["wrt"]]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which sums of another are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
