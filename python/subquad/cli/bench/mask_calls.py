"""The calls that masks are timed by, and the plain ones that they are held against."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

import subquad
from subquad import masks
from subquad.cli.bench import contenders, tensors, verify
from subquad.cli.bench.mask_shape import MaskShape
from subquad.cli.bench.tensors import Inputs
from subquad.cli.bench.verify import Check

Place = tuple[slice, slice]


class MaskCall(NamedTuple):
    """One call that is timed.

    Attributes:
        shape: What it computes.
        inputs: From what, `[B, S, H, D]`.
        ours: The call of subquad; its result is `[B, S, H, D]`.
        theirs: A call of torch's SDPA with a mask, `[B, H, S, D]`; `None` where it is no contender.
    """

    shape: MaskShape
    inputs: Inputs
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None

    @property
    def theirs_is_slow(self) -> bool:
        """Whether torch's mask has all pairs of a long sequence."""
        return self.theirs is not None and self.shape.window > 0

    def check(self, dtype: str) -> Check:
        """Makes the call and checks its result, each sequence as one alone, and torch's where that is not slow."""
        out = self.ours()
        theirs = None if self.theirs is None or self.theirs_is_slow else self.theirs().transpose(1, 2)
        places = _places(self.shape)
        checks = [
            verify.check(
                part,
                dtype,
                _cut(self.inputs, place),
                out[place],
                None if theirs is None else theirs[place].transpose(1, 2),
            )
            for part, place in zip(self.shape.parts(), places, strict=True)
        ]
        error = float(np.max([check.error for check in checks]))
        failures = [check.failure for check in checks if check.failure]
        if self.shape.layout == "padded" and any(
            tensors.to_float64(out[entries, tokens.stop :]).any() for entries, tokens in places
        ):
            failures.append("padding has a result that is not zero")
        return Check(error, failures[0] if failures else "")


class MaskCalls(NamedTuple):
    """What is timed for one shape and dtype.

    Attributes:
        calls: The calls that are measured.
        plain: The call that they are held against; `None` where that is one of them.
    """

    calls: Sequence[MaskCall]
    plain: Callable[[], Any] | None


def _places(shape: MaskShape) -> list[Place]:
    """Returns where in the arrays each sequence of a call lies."""
    if shape.layout == "padded":
        return [(slice(entry, entry + 1), slice(0, length)) for entry, length in enumerate(shape.lengths)]
    lengths = [part.queries for part in shape.parts()]
    return [
        (slice(0, 1), slice(end - length, end))
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    ]


def _cut(inputs: Inputs, place: Place) -> Inputs:
    return Inputs(*(array[place] for array in inputs))


def _packed(shape: MaskShape, inputs: Inputs) -> Callable[[], Any]:
    q, k, v = (array[0] for array in inputs)
    ends = tensors.integers([0, *accumulate(shape.lengths)], q)
    return lambda: subquad.attention_varlen(q, k, v, ends, ends, causal=shape.causal)[None]


def _torch_mask(shape: MaskShape, like: Any) -> Any:
    """Returns the mask as torch takes it: of all pairs, or of keys for each sequence."""
    if shape.layout == "padded":
        seen = masks.padding(shape.lengths).dense(shape.batch, 1, shape.keys)[:, None]
        return tensors.in_library(np.array(seen), like)
    return contenders.window_mask(shape, like)


def _call(shape: MaskShape, dtype: str, inputs: Inputs, *, use_torch: bool) -> MaskCall:
    ours = _packed(shape, inputs) if shape.layout == "packed" else contenders.ours_call(shape, inputs)
    theirs = None
    if use_torch and dtype in shape.torch_floor:
        pair = contenders.sdpa_calls(shape, inputs, _torch_mask(shape, inputs.q))
        theirs = None if pair is None else pair[1]
    return MaskCall(shape, inputs, ours, theirs)


def _one_after_another(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def make(shape: MaskShape, dtype: str, *, use_torch: bool) -> MaskCalls:
    """Returns the calls of a shape, all on the same memory.

    Args:
        shape: What they compute.
        dtype: Their element type.
        use_torch: Whether they are on torch tensors, and torch may be a contender.
    """
    inputs = tensors.make_inputs(shape, dtype, use_torch=use_torch)
    calls = [
        _call(each, dtype, _cut(inputs, (slice(None), slice(each.queries))), use_torch=use_torch)
        for each in shape.calls()
    ]
    if shape.layout == "apart":
        return MaskCalls(calls, None)
    alone = zip(shape.plain(), _places(shape), strict=True)
    plain = [contenders.ours_call(part, _cut(inputs, place)) for part, place in alone]
    return MaskCalls(calls, _one_after_another(plain))
