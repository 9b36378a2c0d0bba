"""What stands in for the extension where PyTorch has to know of a diagonal recurrence: see `subquad.torch.calls`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad.torch.dispatch import as_cast, casts, compute
from subquad.torch.operator_row import Operator, Options
from subquad.torch.plain import Route, route
from subquad.torch.scan_operators import LINEAR_SCAN, SELECTIVE_SCAN


def _compute(operator: Operator, tensors: Sequence[Any], options: Options) -> Any:
    if casts():
        tensors, options = as_cast(operator, tensors, options)
        with torch.autocast("cpu", enabled=False):
            return _compute(operator, tensors, options)
    names = operator.tensors_among(options)
    way = route((*tensors, *[options[name] for name in names]))
    if way is Route.EXTENSION:
        return operator.compute(tensors, options)
    return compute(operator, tensors, options, way, names)


def selective_scan(u: Any, delta: Any, a: Any, b: Any, c: Any, options: Options) -> tuple[Any, Any]:
    """Computes outputs and last states of `subquad.ops.selective_scan_fn`.

    Autocast casts inputs, steps, `B`, `C` and the gate; other parameters and states stay what they are.
    """
    out, last_state, _ = _compute(SELECTIVE_SCAN, (u, delta, a, b, c), options)
    return out, last_state


def linear_scan(x: Any, g: Any, options: Options) -> tuple[Any, Any]:
    """Computes outputs and final states of `subquad.ops.chunk_hgrn`.

    Autocast casts the inputs; gates and states stay what they are.
    """
    out, final_state = _compute(LINEAR_SCAN, (x, g), options)
    return out, final_state
