"""Options of attention as values that a schema of PyTorch can carry, and back.

Masks and normalizers are no tensors. What they lower to, nested tuples of names, numbers and integer arrays, becomes a text in
which `{n}` stands for the array number `n`, and a list of those arrays as tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from subquad.torch.operators import Operator, Options

_UNBOUNDED = -1
# An empty list would count as one of tensors; windows have an even number of sides.
_IN_TABLES = [-2]
_SIGNED, _UNSIGNED = 2**63, 2**64


def _table(array: Any) -> torch.Tensor:
    # Arrays of masks cannot be written to, of which PyTorch would warn.
    return torch.as_tensor(array.copy()) if isinstance(array, np.ndarray) else array


def _text(part: Any, tables: list[torch.Tensor]) -> str:
    if isinstance(part, (tuple, list)):
        inner = "".join([_text(one, tables) + "," for one in part])
        return f"({inner})" if isinstance(part, tuple) else f"[{inner}]"
    if isinstance(part, (np.ndarray, torch.Tensor)):
        tables.append(_table(part))
        return f"{{{len(tables) - 1}}}"
    if part is None or isinstance(part, (bool, int, float, str)):
        return repr(part)
    raise NotImplementedError(
        f"mask: torch.compile, torch.export and fake tensors cannot carry {type(part).__name__}; use subquad.masks, or a "
        "boolean bias"
    )


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return ast.literal_eval(text)


def _with_tables(part: Any, tables: Sequence[torch.Tensor]) -> Any:
    if isinstance(part, (tuple, list)):
        return type(part)([_with_tables(one, tables) for one in part])
    if isinstance(part, set):
        return tables[next(iter(part))].numpy()
    return part


def _flat_window(window_size: Any, tables: list[torch.Tensor]) -> list[int] | None:
    """Returns the sides of one window, or of one for each head; an array becomes the last table.

    -1 stands for unbounded, and negative sides, which an operator may refuse, for one less.
    """
    if window_size is None:
        return None
    if isinstance(window_size, (np.ndarray, torch.Tensor)):
        tables.append(_table(window_size))
        return _IN_TABLES
    sides: list[Any] = []
    for one in window_size:
        if isinstance(one, (tuple, list)):
            sides.extend(one)
        else:
            sides.append(one)
    return [_UNBOUNDED if side is None else side - (side < 0) for side in sides]


def _window(flat: list[int] | None, tables: Sequence[torch.Tensor]) -> Any:
    if flat is None:
        return None
    if list(flat) == _IN_TABLES:
        return tables[-1]
    sides = [None if side == _UNBOUNDED else side + (side < 0) for side in flat]
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    return pairs[0] if len(pairs) == 1 else pairs


def schema(operator: Operator) -> str:
    """Returns the schema of an operator: its tensors, the optional ones, tables, and the other options."""
    names = [*operator.tensors, *(f"{name}?" for name in operator.optional)]
    tensors = [f"Tensor{'?' * name.endswith('?')} {name.rstrip('?')}" for name in names]
    # An option that may be a tensor or a number is there twice.
    others = [
        f"{kind} {name}{'_number' * (name in operator.optional)}" for name, kind in operator.others.items()
    ]
    return f"{operator.name}({', '.join([*tensors, 'Tensor[] tables', *others])}) -> {operator.returns}"


def _carried(name: str, kind: str, value: Any, tables: list[torch.Tensor]) -> Any:
    if value is None or (isinstance(value, torch.Tensor) and name != "window_size"):
        return None
    if kind == "str?":
        return _text(value, tables)
    if name == "window_size":
        return _flat_window(value, tables)
    if kind.startswith("float"):
        return float(value)
    if name == "dropout_seed":
        # Integers of a schema have a sign.
        return value if value < _SIGNED else value - _UNSIGNED
    return bool(value) if kind == "bool" else value


def carried(operator: Operator, tensors: Sequence[Any], options: Options) -> tuple[Any, ...]:
    """Returns a call as the arguments of a custom operator.

    Raises:
        NotImplementedError: for masks that are not those of `subquad.masks`.
    """
    tables: list[torch.Tensor] = []
    optional = [options[name] for name in operator.optional]
    optional = [one if isinstance(one, torch.Tensor) else None for one in optional]
    # A window last: `restored` finds its array at the end.
    names = sorted(operator.others, key=lambda name: name == "window_size")
    others = {name: _carried(name, operator.others[name], options[name], tables) for name in names}
    return (*tensors, *optional, tables, *[others[name] for name in operator.others])


def _restored(name: str, kind: str, value: Any, tables: Sequence[torch.Tensor]) -> Any:
    if value is None:
        return None
    if kind == "str?":
        return _with_tables(_parsed(value), tables)
    if name == "window_size":
        return _window(value, tables)
    if name == "dropout_seed":
        return value % _UNSIGNED
    return value


def restored(operator: Operator, arguments: Sequence[Any]) -> tuple[Sequence[Any], Options]:
    """Returns the tensors and options of a call of a custom operator; the inverse of `carried`."""
    count, last = len(operator.tensors), len(operator.tensors) + len(operator.optional)
    tables, *others = arguments[last:]
    options = {
        name: _restored(name, kind, value, tables)
        for (name, kind), value in zip(operator.others.items(), others, strict=True)
    }
    for name, tensor in zip(operator.optional, arguments[count:last], strict=True):
        options[name] = options.get(name) if tensor is None else tensor
    return arguments[:count], options
