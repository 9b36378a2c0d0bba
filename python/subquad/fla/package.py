"""flash-linear-attention where it is: its functions, for CPU tensors, are ours.

A function that looks for backends at each call is left as it is, and ours is registered with what it looks into. The others are
replaced in every module of the package that has them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from .. import ops
from .dispatch import Backend, Function, chosen
from .families import FAMILIES
from .layers import FUNCTIONS

_PACKAGE = "fla"
# A table of functions by name, which layers take their activations from.
_TABLE = "ACT2FN"


class Package:
    """The functions of the package that are ours, until `undo`."""

    def __init__(self) -> None:
        """Registers and replaces all of them."""
        self._active = True
        self._backends: dict[int, tuple[Any, Backend]] = {}
        self._chosen: dict[int, tuple[Function, Function]] = {}
        for original, ours in _pairs():
            registry = _registry(original)
            if registry is None:
                replacement = chosen(original, ours, lambda: self._active)
                self._chosen.setdefault(id(original), (original, replacement))
                continue
            _, backend = self._backends.setdefault(id(registry), (registry, Backend()))
            backend.functions[original.__name__] = ours
        for registry, backend in self._backends.values():
            registry.register(backend)
        _replace(self._chosen)

    def undo(self) -> None:
        """Takes back every registration, and puts every function back where ours is, whoever took it there since."""
        self._active = False
        for registry, backend in self._backends.values():
            if registry._backends.get(backend.backend_type) is backend:
                del registry._backends[backend.backend_type]
        _replace({id(ours): (ours, original) for original, ours in self._chosen.values()})


def _pairs() -> Iterator[tuple[Function, Function]]:
    """Yields the functions of the package that we have, with ours."""
    for module, names in FAMILIES.items():
        for name in names:
            yield from _found((module,), name, getattr(ops, name))
    for modules, functions in FUNCTIONS:
        for name, ours in functions.items():
            yield from _found(modules, name, ours)


def _found(modules: tuple[str, ...], name: str, ours: Function) -> Iterator[tuple[Function, Function]]:
    """Yields the pair of a function that the first of some modules has.

    Versions differ in what they have, and where, and some modules of theirs cannot be imported.
    """
    for module in modules:
        try:
            original = getattr(import_module(module), name, None)
        except ImportError:
            continue
        if callable(original):
            yield original, ours
            return


def _registry(function: Any) -> Any | None:
    """Returns the registry of backends that a function looks into at each call, which its decorator keeps to itself."""
    while function is not None:
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # of cells that hold nothing
                held = cell.cell_contents
                if type(held).__name__ == "BackendRegistry" and hasattr(held, "_backends"):
                    return held
        function = getattr(function, "__wrapped__", None)
    return None


def _replace(replacements: dict[int, tuple[Any, Any]]) -> None:
    """Replaces objects by others, by identity, in all modules of the package."""
    for names in _names():
        for name, value in list(names.items()):
            old, new = replacements.get(id(value), (None, None))
            if old is not None and old is value:
                names[name] = new


def _names() -> Iterator[MutableMapping[str, Any]]:
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] != _PACKAGE:
            continue
        names = vars(module)
        yield names
        # Another one by that name is transformers', and builds an object for each look-up.
        if type(table := names.get(_TABLE)) is dict:
            yield table
