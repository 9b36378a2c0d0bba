"""Recurrent layers of a model compute with subquad's operators.

transformers' layers look the functions they compute with up among the globals of their file when they run, so that
a stand-in there reaches layers that exist already. It reaches those of all models of the file too: `forward` of the layers of
a patched model, shadowed, notes that it runs, and a stand-in called from anywhere else is the original. Before (up to 5.15)
layers kept the functions they found as attributes: there the stand-in takes the attribute's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, update_wrapper
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import nn

from subquad.hf.fallbacks import FALLBACKS, Fallback, Running
from subquad.hf.interface import names_in, own_functions
from subquad.hf.report import Recurrent, Tally

_SEAM = "forward"
# An attribute of the module, as `torch.compile` cannot trace weak dictionaries.
_ATTRIBUTE = "_subquad_recurrent"

_lock = RLock()


@dataclass(frozen=True)
class _Binding:
    """What a layer of a patched model knows about its patches.

    Attributes:
        tallies: Their counts.
    """

    tallies: tuple[Tally, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Binding:
        """Returns itself: a copy of the module computes as the module does."""
        return self


@dataclass(frozen=True)
class _Call:
    running: Running
    binding: _Binding


_current: ContextVar[_Call | None] = ContextVar("subquad_recurrent_layer", default=None)


class StandIn:
    """Stands for a function of transformers: computes calls from layers of patched models with an operator of subquad.

    Attributes:
        __wrapped__: The function, which computes all other calls.
    """

    def __init__(self, original: Any, name: str, fallback: Fallback) -> None:
        """Takes the function, its name for reports, and what is known about it."""
        update_wrapper(self, original, updated=())
        self.__wrapped__ = original
        self._name, self._fallback = name, fallback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function returns."""
        call = None if torch.compiler.is_compiling() else _current.get()
        if call is None:
            return self.__wrapped__(*args, **kwargs)
        given = dict(zip(self._fallback.parameters, args, strict=False)) | kwargs
        result = self._fallback.compute(call.running, **given)
        if isinstance(result, str):
            for tally in call.binding.tallies:
                tally.delegated[result, self._name] += 1
            return self.__wrapped__(*args, **kwargs)
        for tally in call.binding.tallies:
            tally.recurrent[self._fallback.operator] += 1
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        """Returns itself, as functions do."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as the function."""
        return _itself, (self.__wrapped__,)


def _itself(function: Any) -> Any:
    return function


@dataclass
class _Place:
    """Where a stand-in is.

    Attributes:
        namespace: Globals of a file, or attributes of a module.
        name: Its name there.
        stand_in: The stand-in.
        holders: How many patches use it.
    """

    namespace: dict[str, Any]
    name: str
    stand_in: StandIn
    holders: int = 0


_places: dict[tuple[int, str], _Place] = {}


def _hold(namespace: dict[str, Any], name: str, fallback: Fallback) -> None:
    place = _places.get((id(namespace), name))
    if place is None:
        place = _Place(namespace, name, StandIn(namespace[name], name, fallback))
        _places[id(namespace), name] = place
        namespace[name] = place.stand_in
    place.holders += 1


def _release(key: tuple[int, str]) -> None:
    place = _places[key]
    place.holders -= 1
    if place.holders:
        return
    del _places[key]
    # What others have put in its place since is theirs to undo.
    if place.namespace.get(place.name) is place.stand_in:
        place.namespace[place.name] = place.stand_in.__wrapped__


def _original(function: Any) -> Any:
    return function.__wrapped__ if isinstance(function, StandIn) else function


def _known(name: str, function: Any) -> Fallback | None:
    fallback = FALLBACKS.get(name)
    return fallback if fallback is not None and fallback.describes(_original(function)) else None


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
        fallback = _known(name, function.__globals__.get(name))
        if fallback is not None:
            yield function.__globals__, name, fallback
    for name, attribute in vars(module).items():
        if not isinstance(attribute, nn.Module) and callable(attribute):
            fallback = _known(getattr(attribute, "__name__", ""), attribute)
            if fallback is not None:
                yield vars(module), name, fallback


def _shadowed_by_others(module: nn.Module) -> bool:
    # A pickle of a patched model holds the method of the class.
    own = getattr(vars(module).get(_SEAM), "__func__", None)
    return _SEAM in vars(module) and own not in (forward, type(module).forward)


# The name is the seam's: a pickled bound method is looked up by it, and finds the module's own again.
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the `forward` of a module's class, and notes that it runs."""
    whole, binding = type(self).forward, getattr(self, _ATTRIBUTE, None)
    if binding is None:
        return whole(self, *args, **kwargs)
    if torch.compiler.is_compiling():
        for tally in binding.tallies:
            tally.compiled = True
        return whole(self, *args, **kwargs)
    token = _current.set(_Call(Running(self, (*args, *kwargs.values())), binding))
    try:
        return whole(self, *args, **kwargs)
    finally:
        _current.reset(token)


class RecurrentLayers:
    """That recurrent layers of a model compute with subquad's operators: what `use_recurrent` returns.

    Attributes:
        modules: The layers.
        coverage: The layers, by class.
        shadowed: Layers that were left alone, as something else has set their `forward`.
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
        counts: Counter[tuple[str, tuple[str, ...], bool]] = Counter()
        for module in modules:
            found = list(_seams(module))
            for namespace, name, fallback in found:
                _hold(namespace, name, fallback)
                held = self._attributes if namespace is vars(module) else self.globals
                held.append((id(namespace), name))
            tallies = getattr(module, _ATTRIBUTE, _Binding(())).tallies
            setattr(module, _ATTRIBUTE, _Binding((*tallies, self._tally)))
            setattr(module, _SEAM, MethodType(forward, module))
            self.modules.append(module)
            operators = tuple(sorted({fallback.operator for _, _, fallback in found}))
            continues = any(fallback.continues for _, _, fallback in found)
            counts[type(module).__name__, operators, continues] += 1
        self.coverage = tuple(
            Recurrent(name, count, operators, continues)
            for (name, operators, continues), count in counts.items()
        )

    def undo(self) -> None:
        """Lets the layers compute as they did. A second call does nothing.

        Where several patches cover a layer, it does so when the last of them is undone, in whatever order.
        """
        with _lock:
            release_globals(self.globals)
            while self._attributes:
                _release(self._attributes.pop())
            while self.modules:
                module = self.modules.pop()
                tallies = getattr(module, _ATTRIBUTE).tallies
                left = tuple(one for one in tallies if one is not self._tally)
                if left:
                    setattr(module, _ATTRIBUTE, _Binding(left))
                else:
                    delattr(module, _ATTRIBUTE)
                    if not _shadowed_by_others(module):
                        delattr(module, _SEAM)


def release_globals(held: list[tuple[int, str]]) -> None:
    """Restores the globals that nobody else holds, and empties the list."""
    with _lock:
        while held:
            _release(held.pop())


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of a model that call a function that subquad has an operator for."""
    return [module for module in model.modules() if next(_seams(module), None) is not None]


def use_recurrent(model: nn.Module, tally: Tally) -> RecurrentLayers:
    """Lets the recurrent layers of a model compute with subquad's operators.

    This puts stand-ins among the globals of transformers' files, and sets two attributes of each layer, of which one, `forward`,
    shadows the method of its class. Layers of other models compute as they did, of the same class too. Calls that operators do not
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
