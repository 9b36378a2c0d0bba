"""The calls that forward and backward are timed by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import subquad
from subquad.cli.bench import contenders, gradient_check, tensors
from subquad.cli.bench.backward_shape import BackwardShape
from subquad.cli.bench.gradient_check import Results
from subquad.cli.bench.tensors import Inputs
from subquad.cli.bench.verify import Check


class BackwardCalls(NamedTuple):
    """What is timed for one shape and dtype.

    Attributes:
        shape: What is computed.
        inputs: From what, `[B, S, H, D]`.
        do: The gradient of the output.
        ours: Forward and backward by subquad.
        dense: The same without the window; `None` where there is none.
        theirs: The same as `ours` by torch's SDPA and its autograd; `None` for what it cannot do, or without torch.
    """

    shape: BackwardShape
    inputs: Inputs
    do: Any
    ours: Callable[[], Results]
    dense: Callable[[], Results] | None
    theirs: Callable[[], Results] | None

    @property
    def theirs_is_slow(self) -> bool:
        """Whether torch has a mask, of all pairs of a long sequence."""
        return self.shape.window > 0

    def check(self, dtype: str) -> Check:
        """Makes the calls and checks their results, against torch's where that takes part."""
        theirs = None if self.theirs is None else self.theirs()
        return gradient_check.check(self.shape, dtype, self.inputs, self.do, self.ours(), theirs)


def ours(shape: BackwardShape, inputs: Inputs, do: Any) -> Callable[[], Results]:
    """Returns a call of subquad forward and backward that allocates its results.

    Args:
        shape: What to compute; the sizes are those of the arrays.
        inputs: From what.
        do: The gradient of the output.
    """
    options = shape.options()

    def call() -> Results:
        out, lse = subquad.attention(*inputs, **options, return_lse=True)
        return Results(out, *subquad.attention_backward(do, *inputs, out, lse, **options))

    return call


def _theirs(shape: BackwardShape, inputs: Inputs, do: Any) -> Callable[[], Results] | None:
    mask = contenders.window_mask(shape, inputs.q) if shape.window else None
    arguments = contenders.sdpa_arguments(shape, inputs, mask)
    if arguments is None:
        return None
    import torch
    from torch.nn import functional

    (q, k, v), options = arguments
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    upstream = do.transpose(1, 2).contiguous()

    def call() -> Results:
        for leaf in leaves:
            leaf.grad = None
        out = functional.scaled_dot_product_attention(*leaves, **options)
        torch.autograd.backward(out, upstream)
        return Results(*(each.transpose(1, 2) for each in (out.detach(), *(leaf.grad for leaf in leaves))))

    return call


def make(shape: BackwardShape, dtype: str, *, use_torch: bool) -> BackwardCalls:
    """Returns the calls of a shape, all on the same values.

    Args:
        shape: What they compute.
        dtype: Their element type.
        use_torch: Whether they are on torch tensors, and torch is a contender.
    """
    inputs = tensors.make_inputs(shape, dtype, use_torch=use_torch)
    do = tensors.make_output_gradient(shape, dtype, use_torch=use_torch)
    return BackwardCalls(
        shape,
        inputs,
        do,
        ours(shape, inputs, do),
        None if shape.dense is None else ours(shape.dense, inputs, do),
        _theirs(shape, inputs, do) if use_torch else None,
    )
