"""Stand-ins for transformers' recurrent functions: where they are, and for whom they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch

from subquad.hf.delta_layers import Kind
from subquad.hf.fallbacks import FALLBACKS, Fallback
from subquad.hf.recurrent_arguments import Running
from subquad.hf.report import Tally

# An attribute of the module, as `torch.compile` cannot trace weak dictionaries.
ATTRIBUTE = "_subquad_recurrent"


@dataclass(frozen=True)
class Tallies:
    """What a layer of a patched model knows about its patches.

    Attributes:
        tallies: Their counts.
        whole: How the layer is made, where it is computed as a whole.
    """

    tallies: tuple[Tally, ...]
    whole: Kind | None = None

    def count(self, operator: str, function: str, result: Any) -> bool:
        """Notes a call of an operator, which was refused if the result is a reason.

        Args:
            operator: Its name.
            function: The name of what it stands in for.
            result: What came of it.

        Returns:
            Whether there is a result.
        """
        refused = isinstance(result, str)
        for tally in self.tallies:
            if refused:
                tally.delegated[result, function] += 1
            else:
                tally.recurrent[operator] += 1
        return not refused

    def count_whole(self, operators: Iterable[str]) -> None:
        """Notes a call of a layer that was computed as a whole, by these operators."""
        for tally in self.tallies:
            tally.recurrent.update(operators)

    def count_in_parts(self, reason: str) -> None:
        """Notes a call of a layer that could not be computed as a whole."""
        for tally in self.tallies:
            tally.in_parts[reason] += 1

    def compiled(self) -> None:
        """Notes that a call is compiled."""
        for tally in self.tallies:
            tally.compiled = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Tallies:
        """Returns itself: a copy of the module computes as the module does."""
        return self


_current: ContextVar[tuple[Running, Tallies] | None] = ContextVar("subquad_recurrent_layer", default=None)


@contextmanager
def running(module: torch.nn.Module, inputs: tuple[Any, ...], tallies: Tallies) -> Iterator[None]:
    """Lets stand-ins compute, for a module of a patched model whose `forward` gets these inputs."""
    token = _current.set((Running(module, inputs), tallies))
    try:
        yield
    finally:
        _current.reset(token)


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
        found = None if torch.compiler.is_compiling() else _current.get()
        if found is None:
            return self.__wrapped__(*args, **kwargs)
        layer, tallies = found
        given = dict(zip(self._fallback.parameters, args, strict=False)) | kwargs
        result = self._fallback.compute(layer, **given)
        if tallies.count(self._fallback.operator, self._name, result):
            return result
        return self.__wrapped__(*args, **kwargs)

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


def hold(namespace: dict[str, Any], name: str, fallback: Fallback) -> tuple[int, str]:
    """Puts a stand-in in the place of a function, or counts one more who uses it.

    Returns:
        What `release` takes.
    """
    place = _places.get((id(namespace), name))
    if place is None:
        place = _Place(namespace, name, StandIn(namespace[name], name, fallback))
        _places[id(namespace), name] = place
        namespace[name] = place.stand_in
    place.holders += 1
    return id(namespace), name


def release(key: tuple[int, str]) -> None:
    """Puts a function back that nobody else holds."""
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


def known(name: str, function: Any) -> Fallback | None:
    """Returns what is known about a function of this name, or about what its stand-in stands for."""
    fallback = FALLBACKS.get(name)
    return fallback if fallback is not None and fallback.describes(_original(function)) else None
