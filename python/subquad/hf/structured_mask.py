"""A mask described by a few numbers and the padding, in place of a tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from subquad import masks
from subquad.hf.patterns import Pattern, Span

_RANK = 4
# What leaves a tensor's values and dtype as they are.
_KEEPS = frozenset({"clone", "contiguous", "cpu", "detach"})


class DenseForm:
    """The tensor that a `StructuredMask` stands for, built at most once.

    Attributes:
        given_away: Whether code outside subquad holds the tensor. It may then have been written to, so that
            it counts instead of the description.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        """Takes the function that builds the tensor."""
        self._build = build
        self._tensor: Any = None
        self.given_away = False

    def tensor(self) -> Any:
        """Returns the tensor, `[B, 1, Sq, Sk]`, in the form of the original implementation."""
        if self._tensor is None:
            self._tensor = self._build()
        return self._tensor


class CallMask(NamedTuple):
    """How one call of `subquad.attention` expresses a mask.

    Attributes:
        causal: Its argument `causal`, aligned bottom-right.
        visible: How many keys to pass: those after them are hidden from every query.
        bias: Its argument `bias`.
        window_size: Its argument `window_size`.
        mask: Its argument `mask`.
    """

    causal: bool
    visible: int
    bias: torch.Tensor | None
    window_size: tuple[int | None, int | None] | None = None
    mask: masks.Mask | None = None


class _Runs(NamedTuple):
    """Padding of which each sequence is one run of tokens.

    Attributes:
        lengths: Positions after the last token, `[B]`.
        leftpad: Positions of the first token, `[B]`.
    """

    lengths: list[int]
    leftpad: list[int]


def _runs(padding: torch.Tensor) -> _Runs | None:
    """Returns padding as runs, `None` if a sequence is more than one."""
    counts = padding.sum(1)
    first = padding.int().argmax(1)
    last = padding.shape[1] - padding.flip(1).int().argmax(1)
    if bool(((last - first != counts) & (counts > 0)).any()):
        return None
    empty = counts == 0
    return _Runs(last.masked_fill(empty, 0).tolist(), first.masked_fill(empty, 0).tolist())


@dataclass(frozen=True, eq=False)
class StructuredMask:
    """A mask by positions, padding, or both. Takes `O(B Sk)` memory at most.

    Query `i` is at position `i + offset` and sees key `j` if `padding[b, j]` and the pattern shows it.

    To other code it is a tensor `[B, 1, Sq, Sk]`: torch functions, operators and methods of tensors build
    that tensor and use it.

    Attributes:
        pattern: What is shown by position.
        batch_size: `B`.
        q_length: `Sq`.
        kv_length: `Sk`.
        offset: Position of the first query minus that of the first key.
        first_key: Position of the first key.
        padding: `[B, Sk]`, bool, True where there is a token; `None` if all keys are tokens.
        same_tokens: Whether query and key of one position are the same token. The output of padding is then
            of no use, and is 0.
        dense_form: The tensor it stands for.
    """

    pattern: Pattern
    batch_size: int
    q_length: int
    kv_length: int
    offset: int
    first_key: int
    padding: torch.Tensor | None
    same_tokens: bool
    dense_form: DenseForm

    @cached_property
    def _padding_runs(self) -> _Runs | None:
        return None if self.padding is None else _runs(self.padding)

    def for_call(self, q_length: int, kv_length: int) -> CallMask | None:
        """Expresses the mask by the arguments of `subquad.attention`.

        Args:
            q_length: Number of queries in the call.
            kv_length: Number of keys in the call.

        Returns:
            The arguments; `None` if the mask has other lengths or needs the tensor.
        """
        if (q_length, kv_length) != (self.q_length, self.kv_length) or self.dense_form.given_away:
            return None
        return self._as_arguments

    @cached_property
    def _as_arguments(self) -> CallMask | None:
        causal, visible = self._causal_and_visible
        # The kernel aligns queries with the last keys that it gets.
        if visible is None or not 0 < visible <= self.kv_length:
            return None
        rest = self.pattern.lowered_rest(self._span(visible))
        shown = [] if rest is None else [rest]
        bias = None
        if self.padding is not None:
            if self._padding_runs is None:
                bias = self.padding[:, None, None, :visible]
            else:
                shown.append(self._padding_in(self._padding_runs, visible))
        mask = reduce(operator.and_, shown) if shown else None
        return CallMask(causal, visible, bias, self.pattern.window, mask)

    @property
    def _causal_and_visible(self) -> tuple[bool, int | None]:
        """The argument `causal`, and how many keys to pass; `None` if keys after the queries are seen by position."""
        pattern, end = self.pattern, self.offset + self.q_length
        if not pattern.is_plain:
            ends = end == self.kv_length or pattern.end_by(self.first_key + end, self._span(self.kv_length))
            return pattern.causal, end if ends else None
        if not pattern.causal:
            return False, self.kv_length
        # The first query sees all keys, or there is only one query: nothing to align.
        if self.offset + 1 >= self.kv_length or self.q_length == 1:
            return False, min(end, self.kv_length)
        return True, end

    def _span(self, visible: int) -> Span:
        first = self.first_key + self.offset
        return Span(first, first + self.q_length - 1, self.first_key, self.first_key + visible - 1)

    def _padding_in(self, runs: _Runs, visible: int) -> masks.Mask:
        lengths = [min(length, visible) for length in runs.lengths]
        leftpad = [min(first, length) for first, length in zip(runs.leftpad, lengths, strict=True)]
        queries = self.same_tokens and self.offset + self.q_length == visible
        return masks.padding(lengths, leftpad, queries=queries)

    def dense(self) -> Any:
        """Returns the tensor, `[B, 1, Sq, Sk]`, for reading."""
        return self.dense_form.tensor()

    def give_away(self) -> Any:
        """Returns the tensor to code that may write to it."""
        self.dense_form.given_away = True
        return self.dense_form.tensor()

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return torch.Size((self.batch_size, 1, self.q_length, self.kv_length))

    @property
    def device(self) -> torch.device:
        """The device of the tensor: masks of other devices are never described."""
        return torch.device("cpu")

    @property
    def ndim(self) -> int:
        """The rank of the tensor."""
        return _RANK

    def dim(self) -> int:
        """Returns the rank of the tensor."""
        return _RANK

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Returns the shape of the tensor, or one axis of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        """Returns the batch size."""
        return self.batch_size

    def to(self, *arguments: Any, **options: Any) -> Any:
        """Returns the mask itself for the CPU, else what the tensor's `to` returns."""
        target = arguments[0] if len(arguments) == 1 else options.get("device")
        if isinstance(target, str | torch.device) and torch.device(target).type == "cpu":
            return self
        return self.give_away().to(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Returns attributes and methods of the tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _KEEPS:
            return lambda *_arguments, **_options: self
        value = getattr(self.dense(), name)
        # Methods may write, and `T` or `data` share memory; numbers, dtypes and flags are only read.
        if callable(value) or isinstance(value, torch.Tensor):
            self.give_away()
        return value

    def __getitem__(self, index: Any) -> Any:
        """Returns a part of the mask: a range of queries and leading keys as a mask, others as a tensor."""
        part = self._slice(index)
        return self.give_away()[index] if part is None else part

    def _slice(self, index: Any) -> StructuredMask | None:
        if not (isinstance(index, tuple) and len(index) == _RANK and all(type(i) is slice for i in index)):
            return None
        ranges = [range(*one.indices(size)) for one, size in zip(index, self.shape, strict=True)]
        batch, heads, queries, keys = ranges
        if (
            self.dense_form.given_away
            or batch != range(self.batch_size)
            or heads != range(1)
            or queries.step != 1
            or keys != range(len(keys))
        ):
            return None
        return StructuredMask(
            pattern=self.pattern,
            batch_size=self.batch_size,
            q_length=len(queries),
            kv_length=len(keys),
            offset=self.offset + queries.start,
            first_key=self.first_key,
            padding=None if self.padding is None else self.padding[:, : len(keys)],
            same_tokens=self.same_tokens,
            dense_form=DenseForm(lambda: self.dense()[index]),
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        """Writes to the tensor, which then counts instead of the description."""
        self.give_away()[index] = value

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs a torch function on the tensor."""
        del types

        def to_tensor(value: Any) -> Any:
            return value.give_away() if isinstance(value, cls) else value

        return function(*tree_map(to_tensor, tuple(args)), **tree_map(to_tensor, dict(kwargs or {})))


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: StructuredMask, *others: Any) -> Any:
        return getattr(self.give_away(), name)(*others)

    apply.__name__ = name
    apply.__doc__ = f"Returns the tensor's `{name}`."
    return apply


# Python looks operators up in the class, past `__getattr__`.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "invert", "iter", "bool"),
    *("and", "rand", "or", "ror", "xor", "rxor", "eq", "ne", "lt", "le", "gt", "ge"),
):
    setattr(StructuredMask, f"__{_name}__", _operator(f"__{_name}__"))
StructuredMask.__hash__ = object.__hash__  # type: ignore[method-assign]
