"""Eager differentiation: a `torch.autograd.Function` for each operator, which calls the extension directly.

Two forms of each: PyTorch takes 20 microseconds more for functions that `torch.func` can transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from subquad.torch import library
from subquad.torch.operator_row import Operator, Options
from subquad.torch.plain import active_transform, holds_numbers, is_forward_mode
from subquad.torch.table import TABLE


def apply(operator: Operator, tensors: Sequence[Any], options: Options, names: Sequence[str]) -> Any:
    """Computes an operator so that autograd and `torch.func` can differentiate it.

    Args:
        operator: the operator.
        tensors: its tensors.
        options: its options.
        names: those of the options that are tensors.
    """
    if names:
        # Autograd sees arguments, not what is in a dictionary.
        tensors = (*tensors, *(options[name] for name in names))
        options = options | dict.fromkeys(names)
    function = (_EAGER if active_transform() is None else _TRANSFORMED)[operator.name]
    return function.apply(options, names, *tensors)


def _call(
    operator: Operator, options: Options, names: Sequence[str], tensors: Sequence[Any]
) -> tuple[Sequence[Any], Options]:
    """Returns the tensors and options of a call; the inverse of what `apply` does."""
    if not names:
        return tensors, options
    count = len(operator.tensors)
    return tensors[:count], options | dict(zip(names, tensors[count:], strict=True))


def _save(
    operator: Operator,
    ctx: Any,
    options: Options,
    names: Sequence[str],
    tensors: Sequence[Any],
    outputs: Sequence[Any],
) -> None:
    ctx.options, ctx.names = options, names
    # Changes of tensors that are saved so are found out.
    ctx.save_for_backward(*tensors, *operator.results_kept(outputs))
    if is_forward_mode():
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(operator: Operator, ctx: Any, gradients: Sequence[Any]) -> tuple[Any, ...]:
    names = (*operator.names, *ctx.names)
    needed = ctx.needs_input_grad[2:]
    wrt = operator.wanted(names, needed)
    derivative = operator.derivative_for(wrt)
    if all(gradient is None for gradient in gradients):
        return (None, None, *(None for _ in names))
    saved = ctx.saved_tensors
    tensors, options = _call(operator, ctx.options, ctx.names, saved[: len(names)])
    inputs = operator.derivative_call(gradients, saved[len(names) :], tensors, options)
    options = options | {"wrt": wrt}
    found = dict(zip(wrt, _computed(derivative, inputs, options, ctx.names), strict=True))
    return (None, None, *(found.get(name) for name in names))


def _computed(operator: Operator, tensors: Sequence[Any], options: Options, names: Sequence[str]) -> Any:
    """Computes a derivative, so that it can be differentiated if anything could ask for that."""
    if torch.is_grad_enabled() or active_transform() is not None:
        return apply(operator, tensors, options, names)
    return operator.compute(tensors, options)


def _jvp(operator: Operator, ctx: Any, tangents: Sequence[Any]) -> tuple[Any, ...]:
    if operator.forward_mode is None:
        raise operator.refuse_forward_mode()
    names = (*operator.names, *ctx.names)
    tensors, options = _call(operator, ctx.options, ctx.names, ctx.saved_tensors)

    def compute(row: Operator, tensors: Sequence[Any], options: Options) -> Any:
        return _computed(row, tensors, options, ctx.names)

    found = dict(zip(names, tangents, strict=True))
    return tuple(operator.forward_mode(tensors, options, found, compute))


def _one_by_one(operator: Operator, info: Any, in_dims: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """Computes an operator for each element of a batch."""
    options, names, *tensors = inputs
    dims = in_dims[2:]
    results = []
    for index in range(info.batch_size):
        one = [library.element(value, dim, index) for value, dim in zip(tensors, dims, strict=True)]
        results.append(apply(operator, *_call(operator, options, names, one), names))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _eager(operator: Operator) -> type[Function]:
    class Eager(Function):
        """What autograd differentiates."""

        @staticmethod
        def forward(ctx: Any, options: Options, names: Sequence[str], *tensors: Any) -> Any:
            outputs = operator.compute(*_call(operator, options, names, tensors))
            _save(operator, ctx, options, names, tensors, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return _backward(operator, ctx, gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return _jvp(operator, ctx, tangents[2:])

    return Eager


def _transformed(operator: Operator) -> type[Function]:
    class Transformed(Function):
        """What `torch.func` transforms."""

        @staticmethod
        def forward(options: Options, names: Sequence[str], *tensors: Any) -> Any:
            call = _call(operator, options, names, tensors)
            # Below the last transform there may be fake tensors.
            compute = operator.compute if holds_numbers(tensors) else library.operator_call(operator)
            return tuple(compute(*call))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            options, names, *tensors = inputs
            _save(operator, ctx, options, names, tensors, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return _backward(operator, ctx, gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return _jvp(operator, ctx, tangents[2:])

        @staticmethod
        def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
            return _one_by_one(operator, info, in_dims, inputs)

    return Transformed


def _named(form: type[Function], operator: Operator) -> type[Function]:
    # Nodes of the graph are called `SubquadAttentionBackward`.
    return type(f"Subquad{operator.name.title().replace('_', '')}", (form,), {})


_EAGER = {row.name: _named(_eager(row), row) for row in TABLE}
_TRANSFORMED = {row.name: _named(_transformed(row), row) for row in TABLE}
