"""Masks: which keys a query sees, as descriptions that are read directly and never become a matrix.

`subquad.attention(..., mask=...)` takes any of them, and `&` and `|` join them: `chunked(8192) & causal()` is Llama 4's chunked
attention, `prefix(n) | causal()` a prefix language model, `document(ids) & causal()` packed training.

Query `i` of `Sq` and key `j` of `Sk` are at the positions `p_i = i + Sk - Sq` and `j`: the last query is at the last key
(bottom-right alignment), so that a mask means the same for a whole prompt and for one more token. Positions of queries are negative
where there are more queries than keys; quotients round down, as Python's `//` does.

Integers are one number for every sequence, or an array (NumPy, PyTorch, JAX, a list) of one number for each. They are copied:
changing the array later does not change the mask. Masks compare and hash by identity, as arrays do.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Mask",
    "block_causal",
    "causal",
    "chunked",
    "document",
    "padding",
    "prefix",
    "sliding_window",
]

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]


def _kind(value: object) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"{type(value).__name__} of dtype {dtype}"


def _integer(name: str, value: Any, expected: str, minimum: int) -> int:
    """Returns `value` as an integer of at least `minimum`."""
    try:
        # Booleans are integers to Python, and no number of keys.
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {_kind(value)}")
    if number < minimum:
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def _integers(name: str, value: Any, expected: str, max_rank: int) -> Int64:
    """Returns a read-only copy of integers, of rank 1 or 2 up to `max_rank`; one number becomes an array of one."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {expected}, got {_kind(value)}: {error}") from error
    if array.dtype.kind not in "iu" and not (array.size == 0 and isinstance(value, (list, tuple))):
        raise TypeError(
            f"{name}: expected {expected}, got {_kind(value if hasattr(value, 'dtype') else array)}"
        )
    if array.ndim > max_rank or (array.ndim == 0 and max_rank > 1):
        raise ValueError(f"{name}: expected {expected}, got shape {array.shape}")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected {expected} below 2**63, got {array.max()}")
    copy = np.array(array, dtype=np.int64, order="C", ndmin=1)
    copy.flags.writeable = False
    return copy


def _lengths(name: str, value: Any) -> Int64:
    """Returns numbers of keys, none negative, of shape `[B]` or `[1]`."""
    expected = "an integer from 0 or one for each sequence, [B]"
    array = _integers(name, value, expected, max_rank=1)
    if array.size and array.min() < 0:
        raise ValueError(f"{name}: expected {expected}, got {array.min()}")
    return array


def _shown(array: Int64) -> str:
    return (
        str(array[0]) if array.size == 1 else np.array2string(array, separator=", ", threshold=8, edgeitems=3)
    )


def _rows(name: str, array: Int64, shape: tuple[int, ...]) -> Int64:
    """Returns the array broadcast to `shape`, whose first axis is the batch."""
    row = array if array.ndim == len(shape) else array[None]
    if row.shape[0] not in (1, shape[0]) or row.shape[1:] != shape[1:]:
        raise ValueError(f"{name}: expected shape {shape} or one sequence for all, got {array.shape}")
    return np.broadcast_to(row, shape)


def _positions(seqlen_q: int, seqlen_k: int) -> tuple[Int64, Int64]:
    """Returns the positions of queries, `[Sq, 1]`, and of keys, `[Sk]`."""
    return np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q), np.arange(seqlen_k)


class Mask:
    """What every mask can do."""

    def __and__(self, other: Mask) -> Mask:
        """Returns the mask that shows the keys that both masks show."""
        return _And(_parts(_And, self) + _parts(_And, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        """Returns the mask that shows the keys that either mask shows."""
        return _Or(_parts(_Or, self) + _parts(_Or, other)) if isinstance(other, Mask) else NotImplemented

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns the mask as a matrix, by its definition: for tests and for looking at it.

        Args:
            batch: `B`.
            seqlen_q: `Sq`.
            seqlen_k: `Sk`.

        Returns:
            Booleans, `[B, Sq, Sk]`, that must not be written to: True where the query sees the key.

        Raises:
            ValueError: for integers that do not fit the batch or the lengths.
        """
        raise NotImplementedError

    def _lowered(self) -> tuple[Any, ...]:
        """Returns the mask as the extension reads it: nested tuples of names, integers and int64 arrays."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class causal(Mask):  # noqa: N801 - read as a function, as the others
    """Query `i` sees the keys `j <= p_i`: itself and what came before."""

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        i, j = _positions(seqlen_q, seqlen_k)
        return np.broadcast_to(j <= i, (batch, seqlen_q, seqlen_k))

    def _lowered(self) -> tuple[Any, ...]:
        return ("causal",)


@dataclass(frozen=True, eq=False)
class sliding_window(Mask):  # noqa: N801
    """Query `i` sees the keys `p_i - left <= j <= p_i + right`: `left + 1 + right` of them, itself included.

    Attributes:
        left: keys before the query, from 0; `None` is unbounded.
        right: keys after it, from 0; `None` is unbounded.

    Raises:
        ValueError: for negative numbers.
        TypeError: for what is no integer.
    """

    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("left", "right"):
            value = getattr(self, name)
            if value is not None:
                number = _integer(name, value, "an integer from 0 or None", 0)
                object.__setattr__(self, name, number)

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        i, j = _positions(seqlen_q, seqlen_k)
        seen = np.ones((seqlen_q, seqlen_k), dtype=bool)
        if self.left is not None:
            seen &= j >= i - self.left
        if self.right is not None:
            seen &= j <= i + self.right
        return np.broadcast_to(seen, (batch, seqlen_q, seqlen_k))

    def _lowered(self) -> tuple[Any, ...]:
        return ("window", self.left, self.right)


@dataclass(frozen=True, eq=False)
class _Pieces(Mask):
    """What compares the pieces of `size` keys that a query and a key are in."""

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _integer("size", self.size, "an integer from 1", 1))

    def _numbers(self, seqlen_q: int, seqlen_k: int) -> tuple[Int64, Int64]:
        """Returns the pieces of the queries `[Sq, 1]` and of the keys `[Sk]`."""
        i, j = _positions(seqlen_q, seqlen_k)
        return i // self.size, j // self.size


class chunked(_Pieces):  # noqa: N801
    """Query `i` sees the keys of its own chunk, `j // size == p_i // size`, later ones too.

    Attributes:
        size: keys in a chunk, from 1.

    Raises:
        ValueError: for a size below 1.
        TypeError: for what is no integer.
    """

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        queries, keys = self._numbers(seqlen_q, seqlen_k)
        return np.broadcast_to(keys == queries, (batch, seqlen_q, seqlen_k))

    def _lowered(self) -> tuple[Any, ...]:
        return ("chunked", self.size)


class block_causal(_Pieces):  # noqa: N801
    """Query `i` sees the keys of its own block and of those before, `j // size <= p_i // size`.

    Attributes:
        size: keys in a block, from 1.

    Raises:
        ValueError: for a size below 1.
        TypeError: for what is no integer.
    """

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        queries, keys = self._numbers(seqlen_q, seqlen_k)
        return np.broadcast_to(keys <= queries, (batch, seqlen_q, seqlen_k))

    def _lowered(self) -> tuple[Any, ...]:
        return ("block_causal", self.size)


@dataclass(frozen=True, eq=False, repr=False)
class prefix(Mask):  # noqa: N801
    """Every query sees the first keys, `j < lengths[b]`.

    Attributes:
        lengths: an integer from 0, or integers `[B]`. Lengths beyond `Sk` show every key.

    Raises:
        ValueError: for negative lengths, and arrays of another rank.
        TypeError: for what is no integer.
    """

    lengths: Any

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(self, "lengths", _lengths("lengths", self.lengths))

    def __repr__(self) -> str:
        """Returns the call that makes the mask."""
        return f"prefix({_shown(self.lengths)})"

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        lengths = _rows("lengths", self.lengths, (batch,))
        seen = np.arange(seqlen_k) < lengths[:, None, None]
        return np.broadcast_to(seen, (batch, seqlen_q, seqlen_k))

    def _lowered(self) -> tuple[Any, ...]:
        return ("prefix", self.lengths)


@dataclass(frozen=True, eq=False, repr=False)
class document(Mask):  # noqa: N801
    """A query sees the keys of its own document, those with the same id, wherever they lie.

    Attributes:
        ids: the documents of the queries: integers `[Sq]` or `[B, Sq]`.
        key_ids: the documents of the keys: integers `[Sk]` or `[B, Sk]`. `None`: as `ids`, and `Sk` must be `Sq`.

    Raises:
        ValueError: for arrays of another rank.
        TypeError: for what is no integer.
    """

    ids: Any
    key_ids: Any = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        object.__setattr__(self, "ids", _integers("ids", self.ids, "integers, [Sq] or [B, Sq]", max_rank=2))
        if self.key_ids is not None:
            keys = _integers("key_ids", self.key_ids, "integers, [Sk] or [B, Sk], or None", max_rank=2)
            object.__setattr__(self, "key_ids", keys)

    def __repr__(self) -> str:
        """Returns the call that makes the mask, with shapes for arrays."""
        shapes = [f"ids of shape {self.ids.shape}"]
        if self.key_ids is not None:
            shapes.append(f"key_ids of shape {self.key_ids.shape}")
        return f"document({', '.join(shapes)})"

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        queries = _rows("ids", self.ids, (batch, seqlen_q))
        name, keys = ("ids", self.ids) if self.key_ids is None else ("key_ids", self.key_ids)
        return np.equal(queries[:, :, None], _rows(name, keys, (batch, seqlen_k))[:, None, :])

    def _lowered(self) -> tuple[Any, ...]:
        return ("document", self.ids, self.key_ids)


@dataclass(frozen=True, eq=False, repr=False)
class padding(Mask):  # noqa: N801
    """Only real tokens are seen: the keys `leftpad[b] <= j < lengths[b]`.

    Attributes:
        lengths: where each sequence ends: an integer from 0, or integers `[B]`. They count from the first place, the left padding
            included.
        leftpad: where each sequence begins: an integer from 0, or integers `[B]`, none above `lengths`. `None`: at 0.
        queries: whether a query whose position is outside that range sees nothing, so that its output is zero.

    Raises:
        ValueError: for negative numbers, `leftpad` beyond `lengths`, and arrays of another rank or of different lengths.
        TypeError: for what is no integer, and for `queries` that is no boolean.
    """

    lengths: Any
    leftpad: Any = None
    queries: bool = False

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not isinstance(self.queries, bool):
            raise TypeError(f"queries: expected a boolean, got {_kind(self.queries)}")
        lengths = _lengths("lengths", self.lengths)
        object.__setattr__(self, "lengths", lengths)
        if self.leftpad is None:
            return
        leftpad = _lengths("leftpad", self.leftpad)
        object.__setattr__(self, "leftpad", leftpad)
        if leftpad.size != lengths.size and 1 not in (leftpad.size, lengths.size):
            raise ValueError(
                f"leftpad: expected one number or {lengths.size} as lengths has, got {leftpad.size}"
            )
        beyond = np.argwhere(leftpad > lengths)
        if beyond.size:
            b = int(beyond[0, 0])
            start, end = np.broadcast_arrays(leftpad, lengths)
            raise ValueError(
                f"leftpad: expected at most the {end[b]} of lengths, got {start[b]} for sequence {b}"
            )

    def __repr__(self) -> str:
        """Returns the call that makes the mask."""
        shown = [_shown(self.lengths)]
        if self.leftpad is not None:
            shown.append(f"leftpad={_shown(self.leftpad)}")
        if self.queries:
            shown.append("queries=True")
        return f"padding({', '.join(shown)})"

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        """Returns `[B, Sq, Sk]`; see `Mask.dense`."""
        i, j = _positions(seqlen_q, seqlen_k)
        end = _rows("lengths", self.lengths, (batch,))[:, None, None]
        start = np.zeros((1, 1, 1), dtype=np.int64)
        if self.leftpad is not None:
            start = _rows("leftpad", self.leftpad, (batch,))[:, None, None]
        seen = (start <= j) & (j < end)
        if self.queries:
            seen = seen & (start <= i) & (i < end)
        return np.broadcast_to(seen, (batch, seqlen_q, seqlen_k))

    def _lowered(self) -> tuple[Any, ...]:
        return ("padding", self.lengths, self.leftpad, self.queries)


@dataclass(frozen=True, eq=False, repr=False)
class _And(Mask):
    """Shows the keys that all of its parts show."""

    parts: tuple[Mask, ...]

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, _Or) else repr(part) for part in self.parts)

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        seen: Bool = np.logical_and.reduce([part.dense(batch, seqlen_q, seqlen_k) for part in self.parts])
        return seen

    def _lowered(self) -> tuple[Any, ...]:
        return ("and", [part._lowered() for part in self.parts])


@dataclass(frozen=True, eq=False, repr=False)
class _Or(Mask):
    """Shows the keys that any of its parts shows."""

    parts: tuple[Mask, ...]

    def __repr__(self) -> str:
        return " | ".join(repr(part) for part in self.parts)

    def dense(self, batch: int, seqlen_q: int, seqlen_k: int) -> Bool:
        seen: Bool = np.logical_or.reduce([part.dense(batch, seqlen_q, seqlen_k) for part in self.parts])
        return seen

    def _lowered(self) -> tuple[Any, ...]:
        return ("or", [part._lowered() for part in self.parts])


def _parts(joined: type[_And] | type[_Or], mask: Mask) -> tuple[Mask, ...]:
    """Returns what a mask of that kind joins, so that `a & b & c` is one mask of three parts."""
    return mask.parts if isinstance(mask, joined) else (mask,)
