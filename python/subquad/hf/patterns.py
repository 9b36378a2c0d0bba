"""Which tokens see which: patterns of causal masks, windows and groups of tokens, over positions in a sequence."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

import torch

from subquad import masks


@dataclass(frozen=True)
class Span:
    """The positions of one forward pass, in tokens from the start of the sequence.

    Attributes:
        first_query: Position of the first query.
        last_query: Position of the last query.
        first_key: Position of the first key.
        last_key: Position of the last key.
    """

    first_query: int
    last_query: int
    first_key: int
    last_key: int


@dataclass(frozen=True, eq=False)
class Groups:
    """Tokens that see those of their own group.

    Attributes:
        ids: Groups by position, `[B, n]` or `[1, n]`, integers.
        first: Position of the first of them.
        has_loners: Whether tokens with a negative id are in no group, and see nothing.
    """

    ids: torch.Tensor
    first: int = 0
    has_loners: bool = False

    def covers(self, span: Span) -> bool:
        """Whether every position of a span has an id."""
        first = min(span.first_query, span.first_key) - self.first
        return first >= 0 and max(span.last_query, span.last_key) - self.first < self.ids.shape[1]

    def end_by(self, end: int, span: Span) -> bool:
        """Whether no query sees a key at `end` or after it."""
        return self.has_loners and not bool((self._of(end, span.last_key) >= 0).any())

    def lowered(self, span: Span) -> masks.Mask | None:
        """Returns the mask; `None` if it shows every key of the span."""
        queries = self._of(span.first_query, span.last_query)
        keys = self._of(span.first_key, span.last_key)
        if bool((queries[:, :1] == queries).all()) and bool((queries[:, :1] == keys).all()):
            one_group = not self.has_loners or bool((queries[:, 0] >= 0).all())
            if one_group:
                return None
        if self.has_loners:
            # One id for queries and another for keys: they match nothing.
            queries, keys = queries.clamp(min=-1), keys.clamp(min=-1)
            keys = keys.masked_fill(keys < 0, -2)
        return masks.document(queries, keys)

    def _of(self, first: int, last: int) -> torch.Tensor:
        return self.ids[:, first - self.first : last + 1 - self.first]


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, by position: those that all attributes show.

    Attributes:
        causal: Whether queries are kept from seeing later keys.
        left: How many keys before its own position a query sees; `None` for all.
        right: How many after it; `None` for all. With `causal`, none.
        groups: Groups of tokens that see each other alone.
        either: Sets of patterns: of each set, one has to show the key.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    groups: tuple[Groups, ...] = ()
    either: tuple[tuple[Pattern, ...], ...] = ()

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """`left` and `right`; `None` if neither is bounded."""
        return None if self.left is None and self.right is None else (self.left, self.right)

    @property
    def is_plain(self) -> bool:
        """Whether it is a causal mask, or none."""
        return self.window is None and not self.groups and not self.either

    @property
    def is_autoregressive(self) -> bool:
        """Whether it hides later keys, apart from exceptions: queries and keys are then the same tokens."""
        return self.causal or any(one.is_autoregressive for patterns in self.either for one in patterns)

    def __and__(self, other: Pattern) -> Pattern:
        """Returns what both patterns show."""
        return Pattern(
            causal=self.causal or other.causal,
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            groups=self.groups + other.groups,
            either=self.either + other.either,
        )

    def __or__(self, other: Pattern) -> Pattern:
        """Returns what either pattern shows."""
        if other in (self, Pattern()):
            return other
        return self if self == Pattern() else Pattern(either=((self, other),))

    def end_by(self, end: int, span: Span) -> bool:
        """Whether no query of a span, the last of which is before `end`, sees a key at `end` or after it."""
        return (
            self.causal
            or any(one.end_by(end, span) for one in self.groups)
            or any(all(one.end_by(end, span) for one in patterns) for patterns in self.either)
        )

    def lowered(self, span: Span) -> masks.Mask | None:
        """Returns the mask of a span whose last query and last key are at one position.

        Returns:
            The mask; `None` if it shows every key.
        """
        shown: list[masks.Mask] = []
        if self.causal and span.first_query < span.last_key:
            shown.append(masks.causal())
        if self.window is not None:
            shown.append(masks.sliding_window(self.left, self.right))
        rest = self.lowered_rest(span)
        return reduce(operator.and_, shown if rest is None else [*shown, rest]) if shown else rest

    def lowered_rest(self, span: Span) -> masks.Mask | None:
        """Returns the mask as `lowered` does, without `causal` and the window."""
        shown = [one.lowered(span) for one in self.groups]
        for patterns in self.either:
            lowered = [one.lowered(span) for one in patterns]
            known = [one for one in lowered if one is not None]
            shown.append(reduce(operator.or_, known) if len(known) == len(lowered) else None)
        hiding = [one for one in shown if one is not None]
        return reduce(operator.and_, hiding) if hiding else None


def _least(one: int | None, other: int | None) -> int | None:
    return min((bound for bound in (one, other) if bound is not None), default=None)
