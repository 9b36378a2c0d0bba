"""The calls that recurrent operators are timed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import subquad
from subquad import ops
from subquad.cli.bench import (
    bandwidth,
    contenders,
    recurrent_check,
    recurrent_fallbacks,
    recurrent_inputs,
    turns,
)
from subquad.cli.bench.recurrent_check import Results
from subquad.cli.bench.recurrent_shape import RecurrentShape
from subquad.cli.bench.timing import Contender
from subquad.cli.bench.verify import Check

Inputs = Mapping[str, Any]
Function = Callable[[Inputs], Any]


@dataclass(frozen=True)
class RecurrentCalls:
    """What is timed for one shape with one number of tokens, in one dtype.

    Attributes:
        shape: What is computed.
        inputs: From what, by the names of the operator's arguments.
        ours: A call of subquad. Steps take turns on several states.
        once: Makes a call and returns what it gives, for checking; of steps, from `state`, of which it leaves the numbers.
        base: What it is held against in the same rounds: forward alone for training, attention; `None` for nothing.
        theirs: transformers' fallback on the same values; `None` where there is none or it is not asked for.
        theirs_once: As `once`.
        missing: Why there is no fallback, though it is asked for; empty otherwise.
        state: What a step continues.
        states: What the timed steps update.
        do: The gradient of the outputs.
    """

    shape: RecurrentShape
    inputs: Inputs
    ours: Callable[[], Any]
    once: Callable[[], Results]
    base: Callable[[], Any] | None = None
    theirs: Callable[[], Any] | None = None
    theirs_once: Callable[[], Results] | None = None
    missing: str = ""
    state: Any | None = None
    states: Sequence[Any] = ()
    do: Any | None = None

    def check(self, dtype: str) -> Check:
        """Makes a call and checks its results, against the fallback's where that takes part."""
        return self.checked(dtype, self.once(), None if self.theirs_once is None else self.theirs_once())

    def checked(self, dtype: str, found: Results, theirs: Results | None) -> Check:
        """Checks results of `once`, against those of `theirs_once` if they are given."""
        forward = function(self.shape)
        check = recurrent_check.Checker(self.shape, dtype, self.inputs, self.state, self.do, forward)
        return check(found, theirs)

    def peak(self, dtype: str, threads: int, *, use_torch: bool) -> Contender | None:
        """Returns the probe of what the calls are bound by; `None` where they are held against nothing."""
        if self.shape.bound == "arithmetic":
            return contenders.peak(contenders.peak_kind(dtype), threads, use_torch=use_torch)
        if self.shape.bound == "copy":
            first = next(iter(self.inputs.values()))
            return bandwidth.contender(bandwidth.copy_rate(first, threads), threads, use_torch=use_torch)
        if self.shape.bound == "update":
            return bandwidth.contender(
                bandwidth.update_rate(self.states, threads), threads, use_torch=use_torch
            )
        return None


def _out(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def function(shape: RecurrentShape) -> Function:
    """Returns the operator of a shape, forward, as a function that takes its inputs and returns its outputs."""
    operator = getattr(ops, shape.kind.function)
    options = shape.kind.options
    return lambda inputs: _out(operator(**inputs, **options))


def _trained(forward: Function, inputs: Inputs, do: Any) -> Callable[[], Results]:
    """Returns a call of a function and of its autograd, on leaves of its own that share the memory of the inputs."""
    import torch

    leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}

    def call() -> Results:
        for leaf in leaves.values():
            leaf.grad = None
        out = forward(leaves)
        torch.autograd.backward(out, do.to(out.dtype))
        return Results(out.detach(), gradients={name: leaf.grad for name, leaf in leaves.items()})

    return call


def _training(shape: RecurrentShape, inputs: Inputs, theirs: Function | None) -> RecurrentCalls:
    forward = function(shape)
    do = recurrent_inputs.make_output_gradient(shape, next(iter(inputs.values())))
    ours = _trained(forward, inputs, do)
    fallback = None if theirs is None else _trained(theirs, inputs, do)
    return RecurrentCalls(
        shape,
        inputs,
        ours=ours,
        once=ours,
        base=lambda: forward(inputs),
        theirs=fallback,
        theirs_once=fallback,
        do=do,
    )


def _step(shape: RecurrentShape, dtype: str, inputs: Inputs, theirs: Function | None) -> RecurrentCalls:
    operator = getattr(ops, shape.kind.step)
    first = recurrent_inputs.make_state(shape, dtype, like=inputs["q"])
    states = [_copy(first) for _ in range(turns.copies(shape.useful_bytes(dtype) // 2))]

    def ours(state: Any) -> Results:
        options = {**shape.kind.options, "output_final_state": True, "inplace_final_state": True}
        return Results(*operator(**inputs, **options, initial_state=state))

    def fallback(function: Function, state: Any) -> Results:
        return Results(*function({**inputs, "initial_state": state}))

    return RecurrentCalls(
        shape,
        inputs,
        ours=turns.in_turn([partial(ours, state) for state in states]),
        once=lambda: ours(_copy(first)),
        theirs=None
        if theirs is None
        else turns.in_turn([partial(fallback, theirs, state) for state in states]),
        theirs_once=None if theirs is None else partial(fallback, theirs, first),
        state=first,
        states=states,
    )


def _copy(array: Any) -> Any:
    return array.copy() if isinstance(array, np.ndarray) else array.clone()


def _forward(shape: RecurrentShape, inputs: Inputs, theirs: Function | None) -> RecurrentCalls:
    forward = function(shape)
    base = None
    if shape.against == "attention":
        base = partial(subquad.attention, *(inputs[name] for name in "qkv"), causal=True)
    return RecurrentCalls(
        shape,
        inputs,
        ours=lambda: forward(inputs),
        once=lambda: Results(forward(inputs)),
        base=base,
        theirs=None if theirs is None else partial(theirs, inputs),
        theirs_once=None if theirs is None else lambda: Results(theirs(inputs)),
    )


def make(shape: RecurrentShape, dtype: str, *, use_torch: bool) -> RecurrentCalls:
    """Returns the calls of a shape with one number of tokens, all on the same values.

    Args:
        shape: What they compute; training needs torch.
        dtype: Their element type.
        use_torch: Whether they are on torch tensors, and transformers' fallback may be a contender.
    """
    inputs = recurrent_inputs.make(shape, dtype, use_torch=use_torch)
    theirs, missing = None, ""
    if use_torch and dtype in shape.torch_floor:
        theirs, missing = recurrent_fallbacks.find(shape)
    if shape.form == "training":
        calls = _training(shape, inputs, theirs)
    elif shape.form == "step":
        calls = _step(shape, dtype, inputs, theirs)
    else:
        calls = _forward(shape, inputs, theirs)
    return replace(calls, missing=missing)
