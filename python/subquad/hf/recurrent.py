"""Recurrent layers of a model compute with subquad's operators.

transformers' layers look the functions they compute with up among the globals of their file when they run, so that
a stand-in there reaches layers that exist already. It reaches those of all models of the file too: `forward` of the layers of
a patched model, shadowed, notes that it runs, and a stand-in called from anywhere else is the original. Older versions (4.57 to
5.10 at least) kept the functions of the gated delta rule as attributes of layers: there the stand-in takes the attribute's place.

Layers that `subquad.hf.delta_layers` describes are computed as a whole, except where gradients are needed.

Layers that compute a recurrence in a method of their own have that method shadowed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import nn

from subquad.hf.delta_layers import Kind, kind_of
from subquad.hf.fallbacks import FALLBACKS, Fallback
from subquad.hf.interface import names_in, own_functions
from subquad.hf.methods import METHODS, Method
from subquad.hf.report import Recurrent, Tally
from subquad.hf.stand_ins import ATTRIBUTE, StandIn, Tallies, hold, known, release, running
from subquad.hf.whole_layers import compute, why_not_whole

_REPLACED = "functions that something else has replaced"
_lock = RLock()


@lru_cache(maxsize=1024)
def _names_of(cls: type) -> tuple[tuple[Any, str], ...]:
    """Returns the functions of a class that refer to names of known fallbacks, with the names."""
    return tuple(
        (function, name)
        for function in own_functions(cls)
        if function.__name__ != "__init__"
        for name in sorted(names_in(function) & FALLBACKS.keys())
    )


def _seams(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Fallback]]:
    """Yields the namespaces in which a module finds known fallbacks, and their names there."""
    for function, name in _names_of(type(module)):  # type: ignore[arg-type] # classes are hashable
        fallback = known(name, function.__globals__.get(name))
        if fallback is not None:
            yield function.__globals__, name, fallback
    for name, attribute in vars(module).items():
        if not isinstance(attribute, nn.Module) and callable(attribute):
            fallback = known(getattr(attribute, "__name__", ""), attribute)
            if fallback is not None:
                yield vars(module), name, fallback


def _method(module: nn.Module) -> Method | None:
    """Returns what is known about the method in which a module computes a recurrence itself."""
    return METHODS.get(type(module).__name__)


def _has_stand_ins(module: nn.Module) -> bool:
    """Whether nothing else has taken the place of stand-ins since they were put there."""
    return all(
        isinstance(function.__globals__.get(name), StandIn)
        for function, name in _names_of(type(module))  # type: ignore[arg-type] # classes are hashable
    )


# A pickled bound method is looked up by the name of the function, and finds the module's own again.
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Computes a layer as a whole where that is known, else runs the `forward` of its class, and notes that it runs."""
    original, tallies = type(self).forward, getattr(self, ATTRIBUTE, None)
    if tallies is None:
        return original(self, *args, **kwargs)
    if torch.compiler.is_compiling():
        tallies.compiled()
        return original(self, *args, **kwargs)
    if tallies.whole is not None:
        given = dict(zip(tallies.whole.parameters, args, strict=False)) | kwargs
        result = compute(tallies.whole, self, given) if _has_stand_ins(self) else _REPLACED
        if not isinstance(result, str):
            output, operators = result
            tallies.count_whole(operators)
            return output
        tallies.count_in_parts(result)
    with running(self, (*args, *kwargs.values()), tallies):
        return original(self, *args, **kwargs)


def _computing(name: str) -> Callable[..., Any]:
    """Returns what shadows a method, by name, in which modules compute a recurrence themselves."""

    def shadow(self: Any, *args: Any, **kwargs: Any) -> Any:
        original, tallies = getattr(type(self), name), getattr(self, ATTRIBUTE, None)
        if tallies is not None and torch.compiler.is_compiling():
            tallies.compiled()
        elif tallies is not None:
            method = METHODS[type(self).__name__]
            given = dict(zip(method.parameters(type(self)) or (), args, strict=False)) | kwargs
            result = method.compute(self, **given)
            if tallies.count(method.operator, f"{type(self).__name__}.{name}", result):
                return result
        return original(self, *args, **kwargs)

    shadow.__name__ = name
    return shadow


_SHADOWS = {name: _computing(name) for name in {method.name for method in METHODS.values()}}


def _in_parts(module: Any, **kwargs: Any) -> Any:
    """Runs the `forward` of a module's class with operators in the place of its functions, which nobody counts."""
    with running(module, tuple(kwargs.values()), Tallies(())):
        return type(module).forward(module, **kwargs)


def _whole(module: nn.Module, trials: dict[Any, str | None]) -> tuple[Kind | None, str | None]:
    """Returns how a layer is computed as a whole, or why it is not, if it looks as if it could be.

    Args:
        module: The layer, whose functions have stand-ins.
        trials: What came of those before, of which one does for layers of a class and size.
    """
    kind = kind_of(module)
    if kind is None:
        return None, None
    key = type(module), tuple(one.shape for one in module.parameters())
    if key not in trials:
        trials[key] = why_not_whole(kind, module, _in_parts)
    return (kind, None) if trials[key] is None else (None, trials[key])


def _shadow(module: nn.Module) -> tuple[str, Callable[..., Any]]:
    """Returns which method of a recurrent module is shadowed, and by what."""
    method = _method(module)
    return ("forward", forward) if method is None else (method.name, _SHADOWS[method.name])


def _shadowed_by_others(module: nn.Module) -> bool:
    name, shadow = _shadow(module)
    # A pickle of a patched model holds the method of the class.
    own = getattr(vars(module).get(name), "__func__", None)
    return name in vars(module) and own not in (shadow, getattr(type(module), name))


class RecurrentLayers:
    """That recurrent layers of a model compute with subquad's operators: what `use_recurrent` returns.

    Attributes:
        modules: The layers.
        coverage: The layers, by class.
        shadowed: Layers that were left alone, as something else has shadowed the method that would be.
        globals: The globals that have stand-ins, for `release_globals`.
    """

    def __init__(self, tally: Tally) -> None:
        """Creates one that covers nothing yet."""
        self.modules: list[nn.Module] = []
        self.coverage: tuple[Recurrent, ...] = ()
        self.shadowed: list[nn.Module] = []
        self.globals: list[tuple[int, str]] = []
        self._tally = tally
        self._attributes: list[tuple[int, str]] = []

    def cover(self, modules: list[nn.Module]) -> None:
        """Lets layers compute with subquad's operators."""
        counts: Counter[Recurrent] = Counter()
        trials: dict[Any, str | None] = {}
        for module in modules:
            found = list(_seams(module))
            for namespace, name, fallback in found:
                held = self._attributes if namespace is vars(module) else self.globals
                held.append(hold(namespace, name, fallback))
            tallies = getattr(module, ATTRIBUTE, Tallies(())).tallies
            kind, obstacle = _whole(module, trials)
            setattr(module, ATTRIBUTE, Tallies((*tallies, self._tally), kind))
            name, shadow = _shadow(module)
            setattr(module, name, MethodType(shadow, module))
            self.modules.append(module)
            method = _method(module)
            operators = {fallback.operator for _, _, fallback in found}
            operators |= set() if method is None else {method.operator}
            operators |= set() if kind is None else {*kind.operators}
            continues = any(fallback.continues for _, _, fallback in found)
            layers = Recurrent(
                type(module).__name__, 1, tuple(sorted(operators)), continues, kind is not None, obstacle
            )
            counts[layers] += 1
        self.coverage = tuple(replace(layers, count=count) for layers, count in counts.items())

    def undo(self) -> None:
        """Lets the layers compute as they did. A second call does nothing.

        Where several patches cover a layer, it does so when the last of them is undone, in whatever order.
        """
        with _lock:
            release_globals(self.globals)
            while self._attributes:
                release(self._attributes.pop())
            while self.modules:
                module = self.modules.pop()
                covered: Tallies = getattr(module, ATTRIBUTE)
                left = tuple(one for one in covered.tallies if one is not self._tally)
                if left:
                    setattr(module, ATTRIBUTE, replace(covered, tallies=left))
                else:
                    delattr(module, ATTRIBUTE)
                    if not _shadowed_by_others(module):
                        vars(module).pop(_shadow(module)[0], None)


def release_globals(held: list[tuple[int, str]]) -> None:
    """Restores the globals that nobody else holds, and empties the list."""
    with _lock:
        while held:
            release(held.pop())


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of a model that call a function, or have a method, that subquad has an operator for."""
    return [module for module in model.modules() if _is_known(module)]


def _is_known(module: nn.Module) -> bool:
    method = _method(module)
    return next(_seams(module), None) is not None if method is None else method.describes(module)


def use_recurrent(model: nn.Module, tally: Tally) -> RecurrentLayers:
    """Lets the recurrent layers of a model compute with subquad's operators.

    This puts stand-ins among the globals of transformers' files, and sets two attributes of each layer, of which one shadows a
    method of its class. Layers of other models compute as they did, of the same class too. Calls that operators do not
    take, on other devices than the CPU, while traced and in `torch.compile` are computed by transformers' functions.

    Args:
        model: The model.
        tally: Where calls are counted.

    Returns:
        What undoes it.
    """
    with _lock:
        found = recurrent_modules(model)
        layers = RecurrentLayers(tally)
        layers.shadowed = [module for module in found if _shadowed_by_others(module)]
        layers.cover([module for module in found if not _shadowed_by_others(module)])
        return layers
