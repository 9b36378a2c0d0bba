"""Recognises the mask functions of transformers that are plain causal or hide nothing on a given range.

transformers describes a mask by nested closures over token indices, such as
`and_masks(sliding_window_overlay(512), causal_mask_function)`. A window that is longer than the sequence
hides nothing, so that this one is plain causal for the first 512 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import masking_utils


@dataclass(frozen=True)
class Span:
    """The indices of one forward pass, in tokens from the start of the sequence.

    Attributes:
        first_query: Index of the first query.
        last_query: Index of the last query.
        first_key: Index of the first key.
        last_key: Index of the last key.
    """

    first_query: int
    last_query: int
    first_key: int
    last_key: int


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _is_made_by(function: object, factory: str) -> bool:
    return (
        getattr(function, "__module__", None) == masking_utils.__name__
        and str(getattr(function, "__qualname__", "")).startswith(f"{factory}.<locals>.")
        and hasattr(function, "__code__")
    )


def _hides_nothing(function: Callable[..., Any], span: Span) -> bool:
    """Whether an overlay leaves every pair of a causal query and key of the span visible."""
    if _is_made_by(function, "sliding_window_overlay"):
        window = _captured(function).get("sliding_window")
        return isinstance(window, int) and span.last_query - span.first_key < window
    if _is_made_by(function, "sliding_window_bidirectional_overlay"):
        window = _captured(function).get("sliding_window")
        distance = max(span.last_query - span.first_key, span.last_key - span.first_query)
        return isinstance(window, int) and distance <= window
    if _is_made_by(function, "chunked_overlay"):
        captured = _captured(function)
        size, padding = captured.get("chunk_size"), captured.get("left_padding")
        if not isinstance(size, int) or padding is None:
            return False
        # All real tokens are in chunk 0. Those before them, in chunk -1, are padding.
        return bool(max(span.last_query, span.last_key) - int(padding.min()) < size)
    return False


def is_causal(function: Callable[..., Any], span: Span) -> bool | None:
    """Tells what a mask function of transformers does on a span.

    Args:
        function: The mask function.
        span: The indices it will be asked for.

    Returns:
        True if query `i` sees exactly the keys `j <= i`, False if it sees all, `None` for anything else.
    """
    if function is masking_utils.causal_mask_function:
        return True
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False
    if not _is_made_by(function, "and_masks"):
        return None
    causal = False
    for part in _captured(function).get("mask_functions", (None,)):
        if part is None:
            return None
        if _hides_nothing(part, span):
            continue
        inner = is_causal(part, span)
        if inner is None:
            return None
        causal |= inner
    return causal
