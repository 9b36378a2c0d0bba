"""Sums along the tokens of packed sequences, which begin anew with each of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from .inputs import Inputs
from .namespace import namespace_of, zeros
from .recurrent import check_bounds


def spans_of(cu_seqlens: Any | None, given: Inputs, tokens: int) -> list[tuple[int, int]] | None:
    """Returns the first token of each packed sequence and the one after its last, or `None` if there are none.

    Args:
        cu_seqlens: `[N + 1]`, or `None`.
        given: the arrays of the call, the first with the batch size as its first axis.
        tokens: how many tokens a row has.

    Raises:
        ValueError: for what the engine refuses.
        TypeError: likewise.
    """
    if cu_seqlens is None:
        return None
    check_bounds(cu_seqlens, given.first, tokens, name=given.name)
    return list(pairwise(cu_seqlens.tolist()))


def spans_backwards(spans: list[tuple[int, int]] | None, tokens: int) -> list[tuple[int, int]] | None:
    """Returns `spans_of` what it would be with the tokens of a row in the other order."""
    return spans and [(tokens - end, tokens - first) for first, end in reversed(spans)]


def by_sequence(
    spans: list[tuple[int, int]] | None,
    function: Callable[..., Any],
    *of_tokens: Any,
    of_sequences: tuple[Any, ...] = (),
) -> Any:
    """Returns what a function of whole sequences gives for each of them, one after the other.

    Args:
        spans: see `spans_of`; `None`: each row of a batch is a sequence.
        function: takes arrays of tokens, `[B, T, ...]`, and arrays of sequences, `[B, ...]`, and returns an array of tokens.
        *of_tokens: `[B, T, ...]`.
        of_sequences: `[N, ...]`.
    """
    if spans is None:
        return function(*of_tokens, *of_sequences)
    if not spans:
        # No sequences have no tokens, whatever precedes them.
        return function(*of_tokens, *(zeros(x, (1, *x.shape[1:]), x.dtype) for x in of_sequences))
    parts = [
        function(*(x[:, first:end] for x in of_tokens), *(x[n : n + 1] for x in of_sequences))
        for n, (first, end) in enumerate(spans)
    ]
    return namespace_of("parts", parts[0]).concatenate(parts, 1)


def last_of(spans: list[tuple[int, int]] | None, x: Any, before: Any) -> Any:
    """Returns what belongs to the last token of each sequence, `[N, ...]`.

    Args:
        spans: see `spans_of`.
        x: `[B, T, ...]`.
        before: what sequences without tokens have instead, `[N, ...]`.
    """
    if spans is None:
        return x[:, -1] if x.shape[1] else before
    if not spans:
        return before
    parts = [x[:, end - 1] if end > first else before[n : n + 1] for n, (first, end) in enumerate(spans)]
    return namespace_of("parts", parts[0]).concatenate(parts, 0)
