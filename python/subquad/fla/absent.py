"""`fla.ops` where flash-linear-attention is not: modules that have the operators of `subquad.ops`, made when they are imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .. import ops
from .families import FAMILIES, ROOT, exported


class Modules(MetaPathFinder, Loader):
    """A finder of the modules of `fla` that hold what `subquad.ops` has; it is in place from the start."""

    def __init__(self) -> None:
        """Puts itself in front: a `fla.ops` that cannot be imported may be there."""
        package = ROOT.partition(".")[0]
        names: dict[str, tuple[str, ...]] = {ROOT: exported(), **FAMILIES}
        if package not in sys.modules and find_spec(package) is None:
            names = {package: (), **names}
        self._names: Mapping[str, tuple[str, ...]] = names
        sys.meta_path.insert(0, self)
        if package in sys.modules:
            # Importing it has not failed, and will not happen again: `fla.ops` has to be an attribute of it.
            import_module(ROOT)

    def undo(self) -> None:
        """Removes itself, the modules that it made, and their names in packages that it did not make."""
        sys.meta_path.remove(self)
        for name in self._names:
            module = sys.modules.get(name)
            if module is None or getattr(module.__spec__, "loader", None) is not self:
                continue
            del sys.modules[name]
            package, _, child = name.rpartition(".")
            parent = vars(sys.modules[package]) if package in sys.modules else {}
            if parent.get(child) is module:
                del parent[child]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Returns the specification of a module that is made here, `None` for all others."""
        if fullname not in self._names:
            return None
        return ModuleSpec(fullname, self, is_package=bool(self._children(fullname)))

    def exec_module(self, module: ModuleType) -> None:
        """Lets a module find its operators and its modules when they are asked for."""
        name = module.__name__
        children = self._children(name)
        operators = self._names[name]
        module.__doc__ = (
            "Operators of subquad under the names of flash-linear-attention, which is not installed."
        )
        module.__dict__.update(
            __all__=[*operators],
            __getattr__=_lookup(name, operators, children),
            __dir__=lambda: sorted({*vars(module), *operators, *children}),
        )

    def _children(self, package: str) -> tuple[str, ...]:
        split = (name.rpartition(".") for name in self._names)
        return tuple(child for parent, _, child in split if parent == package)


def _lookup(module: str, operators: Sequence[str], children: Sequence[str]) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        if name in children:
            return import_module(f"{module}.{name}")
        if name in operators:
            return getattr(ops, name)
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}: flash-linear-attention cannot be imported, "
            "and subquad has nothing of that name"
        )

    return find
