"""Recognises the mask functions of transformers that are made of causal masks, windows, chunks, documents and blocks.

transformers describes a mask by nested closures over token indices, such as
`and_masks(sliding_window_overlay(512), causal_mask_function)`. A window that is longer than the sequence
hides nothing, so that this one is plain causal for the first 512 tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from transformers import masking_utils

from subquad.hf.patterns import Groups, Pattern, Span

_RANK = 2


@dataclass(frozen=True)
class _Place:
    """Where in a nest of mask functions one is.

    Attributes:
        span: The indices that the whole is asked for.
        packed: Whether a function further out tells documents apart.
        positions: Positions within documents, `[B, n]`, that the function gets in place of indices; `None` if it gets
            indices. They grow by one from token to token, so that within a document they differ as indices do.
    """

    span: Span
    packed: bool = False
    positions: torch.Tensor | None = None


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _factory(function: object) -> str | None:
    """Returns which function of transformers made a mask function, `None` if none did."""
    if getattr(function, "__module__", None) != masking_utils.__name__ or not hasattr(function, "__code__"):
        return None
    name, _, inner = str(getattr(function, "__qualname__", "")).partition(".<locals>.")
    return name if inner else None


def _causal_window(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    window = captured.get("sliding_window")
    if not isinstance(window, int) or window < 1:
        return None
    # A window that no query of the span leaves hides nothing.
    return Pattern() if place.span.last_query - place.span.first_key < window else Pattern(left=window - 1)


def _two_way_window(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    window = captured.get("sliding_window")
    if not isinstance(window, int) or window < 0:
        return None
    span = place.span
    distance = max(span.last_query - span.first_key, span.last_key - span.first_query)
    return Pattern() if distance <= window else Pattern(left=window, right=window)


def _chunks(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    size, padding = captured.get("chunk_size"), captured.get("left_padding")
    if not isinstance(size, int) or size < 1 or not isinstance(padding, torch.Tensor) or padding.ndim != 1:
        return None
    span = place.span
    first, last = min(span.first_query, span.first_key), max(span.last_query, span.last_key)
    if place.positions is not None:
        groups = Groups((place.positions - padding[:, None]) // size)
        return Pattern(groups=(groups,)) if groups.covers(span) else None
    # All real tokens are in chunk 0. Those before them, in chunk -1, are padding.
    if last - int(padding.min()) < size:
        return Pattern()
    if not padding.any():
        padding = padding[:1]
    positions = torch.arange(first, last + 1) - padding[:, None]
    return Pattern(groups=(Groups(positions // size, first),))


def _documents(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    return _by_index(captured.get("packed_sequence_mask"), place, has_loners=False)


def _blocks(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    return _by_index(captured.get("block_sequence_ids"), place, has_loners=True)


def _by_index(ids: Any, place: _Place, *, has_loners: bool) -> Pattern | None:
    """Returns groups that a function looks up by what it gets, which has to be the index."""
    if place.positions is not None or not isinstance(ids, torch.Tensor):
        return None
    if ids.ndim != _RANK or ids.is_floating_point() or ids.device.type != "cpu":
        return None
    groups = Groups(ids, has_loners=has_loners)
    return Pattern(groups=(groups,)) if groups.covers(place.span) else None


def _positions_in_documents(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    inner, positions = captured.get("mask_function"), captured.get("position_ids")
    if not place.packed or place.positions is not None or not callable(inner):
        return None
    if not isinstance(positions, torch.Tensor) or positions.ndim != _RANK:
        return None
    return _described(inner, replace(place, positions=positions))


def _all_of(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    functions = captured.get("mask_functions", ())
    packed = place.packed or any(_factory(one) == "packed_sequence_mask_function" for one in functions)
    return _joined(operator.and_, functions, replace(place, packed=packed))


def _any_of(captured: Mapping[str, Any], place: _Place) -> Pattern | None:
    return _joined(operator.or_, captured.get("mask_functions", ()), place)


def _joined(
    join: Callable[[Pattern, Pattern], Pattern], functions: tuple[Callable[..., Any], ...], place: _Place
) -> Pattern | None:
    patterns = [_described(one, place) for one in functions]
    known = [one for one in patterns if one is not None]
    return reduce(join, known) if known and len(known) == len(patterns) else None


# What the functions that make mask functions stand for.
_MADE_BY: dict[str, Callable[[Mapping[str, Any], _Place], Pattern | None]] = {
    "and_masks": _all_of,
    "blockwise_overlay": _blocks,
    "chunked_overlay": _chunks,
    "or_masks": _any_of,
    "packed_sequence_mask_function": _documents,
    "remap_positions_for_packed_sequence": _positions_in_documents,
    "sliding_window_bidirectional_overlay": _two_way_window,
    "sliding_window_overlay": _causal_window,
}


def _described(function: Callable[..., Any], place: _Place) -> Pattern | None:
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Pattern()
    describe_made = _MADE_BY.get(_factory(function) or "")
    return None if describe_made is None else describe_made(_captured(function), place)


def describe(function: Callable[..., Any], span: Span) -> Pattern | None:
    """Tells which keys a mask function of transformers shows on a span.

    Args:
        function: The mask function.
        span: The indices it will be asked for.

    Returns:
        The pattern; `None` for a function that is not known.
    """
    return _described(function, _Place(span))
