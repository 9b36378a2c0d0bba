"""Compiled code: a custom operator of `torch.library` for each operator of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subquad.torch.operator_row import Operator, Options
from subquad.torch.plain import is_forward_mode
from subquad.torch.schema_values import carried, restored, schema
from subquad.torch.table import TABLE

NAMESPACE = "subquad"

# Keeps the operators alive.
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def overload(operator: Operator) -> Any:
    """Returns the operator as PyTorch calls it."""
    return getattr(getattr(torch.ops, NAMESPACE), operator.name).default


def call(operator: Operator, tensors: Sequence[Any], options: Options) -> Any:
    """Calls the custom operator.

    Raises:
        NotImplementedError: within forward-mode differentiation, in which PyTorch would take the results for constants.
    """
    if is_forward_mode():
        raise operator.refuse_forward_mode()
    return overload(operator)(*carried(operator, tensors, options))


def operator_call(operator: Operator) -> Callable[[Sequence[Any], Options], Any]:
    """Returns what computes the operator as a custom operator."""
    return lambda tensors, options: call(operator, tensors, options)


def element(value: Any, dim: Any, index: int) -> Any:
    """Returns an argument of one element of a batch: `dim` says where its batches are, `None` where there is none."""
    if isinstance(dim, list):
        return [element(one, of, index) for one, of in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, index)


def autocast(tensor: Any) -> Any:
    """Casts a tensor as autocast does for PyTorch's own function; what is none stays."""
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


def _register(operator: Operator) -> None:
    name = f"{NAMESPACE}::{operator.name}"
    names = [*operator.names, *operator.optional]
    count = len(names)

    def kernel(*arguments: Any) -> Any:
        with torch.no_grad():
            return operator.compute(*restored(operator, arguments))

    def fake(*arguments: Any) -> Any:
        tensors, optional = arguments[: len(operator.tensors)], arguments[len(operator.tensors) : count]
        # All that the shapes of results depend on; what may be a tensor or a number is none of it as a number.
        options = dict(zip(operator.others, arguments[count + 1 :], strict=True))
        options |= dict(zip(operator.optional, optional, strict=True))
        return operator.fake(tensors, options)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tables = inputs[count]
        outputs = operator.results_kept(output)
        ctx.save_for_backward(*inputs[:count], *tables, *outputs)
        ctx.num_tables, ctx.rest = len(tables), inputs[count + 1 :]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *gradients: Any) -> Any:
        wrt = operator.wanted(names, ctx.needs_input_grad[:count])
        derivative = operator.derivative_for(wrt)
        saved, end = ctx.saved_tensors, count + ctx.num_tables
        tables, outputs = list(saved[count:end]), saved[end:]
        if operator.returns == "Tensor[]":
            (gradients,) = gradients
        # What is wanted is the last option of a derivative.
        rest = [one for one, name in zip(ctx.rest, operator.others, strict=True) if name != "wrt"]
        options = {"wrt": ctx.rest[-1]}
        tensors = operator.derivative_call(gradients, outputs, saved[: len(operator.tensors)], options)
        optional = saved[len(operator.tensors) : count]
        found = dict(zip(wrt, overload(derivative)(*tensors, *optional, tables, *rest, wrt), strict=True))
        placed = [found.get(name) for name in names]
        return (*placed, [None] * len(tables), *(None for _ in ctx.rest))

    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        results = []
        for index in range(info.batch_size):
            one = [element(value, dim, index) for value, dim in zip(arguments, in_dims, strict=True)]
            results.append(overload(operator)(*one))
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        # Of the type that the schema says.
        return type(results[0])(stacked), type(results[0])([0] * len(stacked))

    def cast(*arguments: Any) -> Any:
        tensors = [
            autocast(tensor) if of in operator.autocast else tensor
            for of, tensor in zip(names, arguments, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return overload(operator)(*tensors, *arguments[count:])

    _library.define(schema(operator))
    _library.impl(operator.name, kernel, "CPU")
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_vmap(name, vmap, lib=_library)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)
    if operator.derivative is not None:
        _library.impl(operator.name, cast, "AutocastCPU")


for _operator in TABLE:
    _register(_operator)
