"""Recognises the mask functions of transformers that are made of causal masks, windows, chunks and documents.

transformers describes a mask by nested closures over token indices, such as
`and_masks(sliding_window_overlay(512), causal_mask_function)`. A window that is longer than the sequence
hides nothing, so that this one is plain causal for the first 512 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils

_RANK = 2


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


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, by position.

    Attributes:
        causal: Whether queries are kept from seeing later keys.
        left: How many keys before its own position a query sees; `None` for all.
        right: How many after it; `None` for all. With `causal`, none.
        chunk: Length of the chunks, counted from the first key, that queries see alone; `None` for no chunks.
        documents: Numbers of the documents that queries see alone, `[B, S]`; `None` for no documents.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    documents: torch.Tensor | None = None

    def and_(self, other: Pattern) -> Pattern | None:
        """Returns what both patterns show; `None` if that takes two chunkings or two sets of documents."""
        if None not in (self.chunk, other.chunk) and self.chunk != other.chunk:
            return None
        if self.documents is not None and other.documents is not None:
            return None
        return Pattern(
            causal=self.causal or other.causal,
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            chunk=other.chunk if self.chunk is None else self.chunk,
            documents=other.documents if self.documents is None else self.documents,
        )


def _least(one: int | None, other: int | None) -> int | None:
    return min((bound for bound in (one, other) if bound is not None), default=None)


def _overlay(function: Callable[..., Any], span: Span) -> Pattern | None:
    """Returns what a single overlay shows on a span, `None` if that is not known."""
    if _is_made_by(function, "sliding_window_overlay"):
        window = _captured(function).get("sliding_window")
        if not isinstance(window, int) or window < 1:
            return None
        # A window that no causal query of the span leaves hides nothing.
        return Pattern() if span.last_query - span.first_key < window else Pattern(left=window - 1)
    if _is_made_by(function, "sliding_window_bidirectional_overlay"):
        window = _captured(function).get("sliding_window")
        if not isinstance(window, int) or window < 0:
            return None
        distance = max(span.last_query - span.first_key, span.last_key - span.first_query)
        return Pattern() if distance <= window else Pattern(left=window, right=window)
    if _is_made_by(function, "chunked_overlay"):
        captured = _captured(function)
        size, padding = captured.get("chunk_size"), captured.get("left_padding")
        if not isinstance(size, int) or size < 1 or padding is None:
            return None
        # All real tokens are in chunk 0. Those before them, in chunk -1, are padding.
        if max(span.last_query, span.last_key) - int(padding.min()) < size:
            return Pattern()
        aligned = not padding.any() and span.first_key % size == 0
        return Pattern(chunk=size) if aligned else None
    if _is_made_by(function, "packed_sequence_mask_function"):
        documents = _captured(function).get("packed_sequence_mask")
        return (
            Pattern(documents=documents)
            if isinstance(documents, torch.Tensor) and documents.ndim == _RANK
            else None
        )
    return None


def _remapped(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Returns what a mask function is on positions within documents, which grow by one from token to token."""
    inner = _captured(function).get("mask_function")
    return inner if callable(inner) else None


def describe(function: Callable[..., Any], span: Span) -> Pattern | None:
    """Tells which keys a mask function of transformers shows on a span.

    Args:
        function: The mask function.
        span: The indices it will be asked for.

    Returns:
        The pattern; `None` for a function that is not known.
    """
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Pattern()
    if not _is_made_by(function, "and_masks"):
        return _overlay(function, span)
    parts = _captured(function).get("mask_functions", ())
    # Positions that start anew with each document differ as indices do, as long as documents are told apart.
    packed = any(_is_made_by(part, "packed_sequence_mask_function") for part in parts)
    pattern: Pattern | None = Pattern() if parts else None
    for part in parts:
        remapped = packed and _is_made_by(part, "remap_positions_for_packed_sequence")
        one = _remapped(part) if remapped else part
        shown = None if one is None else describe(one, span)
        if pattern is None or shown is None or (remapped and shown.chunk is not None):
            return None
        pattern = pattern.and_(shown)
    return pattern
