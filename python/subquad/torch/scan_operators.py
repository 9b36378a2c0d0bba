"""The diagonal recurrences among the operators that PyTorch knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad import _native
from subquad.torch.operator_row import (
    NO_SECOND,
    WRT,
    Operator,
    Options,
    fake_gradients,
    of_others_than_last,
    wide,
)


def _selective_scan(tensors: Sequence[Any], options: Options) -> Any:
    u, delta, a, b, c = tensors
    return _native.selective_scan(u, delta, a, b, c, options, return_last_state=True, return_checkpoints=True)


def _fake_selective_scan(tensors: Sequence[Any], _options: Options) -> Any:
    u, _, a = tensors[:3]
    (batch, channels, steps), states = u.shape, a.shape[1]
    last = u.new_empty((batch, channels, states), dtype=wide(u.dtype))
    chunks = (steps + _native.SCAN_CHUNK - 1) // _native.SCAN_CHUNK
    checkpoints = u.new_empty((batch, chunks, states, channels), dtype=wide(u.dtype))
    return u.new_empty(u.shape), last, checkpoints


def _selective_scan_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_last_state, checkpoints, u, delta, a, b, c = tensors
    d_out = torch.zeros_like(u) if d_out is None else d_out
    return _native.selective_scan_backward(
        d_out, d_last_state, checkpoints, u, delta, a, b, c, options["wrt"], options
    )


def _fake_selective_scan_backward(tensors: Sequence[Any], options: Options) -> Any:
    return fake_gradients(options | dict(zip(("u", "delta", "A", "B", "C"), tensors[3:], strict=True)))


_OPTIONAL = ("D", "z", "delta_bias", "initial_state")
_OTHERS = {"delta_softplus": "bool"}
SELECTIVE_SCAN_BACKWARD = Operator(
    name="selective_scan_backward",
    tensors=("d_out?", "d_last_state?", "checkpoints", "u", "delta", "A", "B", "C"),
    optional=_OPTIONAL,
    others=_OTHERS | WRT,
    differentiable=frozenset(),
    returns="Tensor[]",
    compute=_selective_scan_backward,
    fake=_fake_selective_scan_backward,
    derivative=None,
    missing=NO_SECOND,
)
SELECTIVE_SCAN = Operator(
    name="selective_scan",
    tensors=("u", "delta", "A", "B", "C"),
    optional=_OPTIONAL,
    others=_OTHERS,
    differentiable=frozenset({"u", "delta", "A", "B", "C", *_OPTIONAL}),
    returns="(Tensor out, Tensor last_state, Tensor checkpoints)",
    compute=_selective_scan,
    fake=_fake_selective_scan,
    derivative=SELECTIVE_SCAN_BACKWARD,
    autocast=frozenset({"u", "delta", "B", "C", "z"}),
    kept=(2,),
    derivative_call=of_others_than_last,
    missing="",
)


def _linear_scan(tensors: Sequence[Any], options: Options) -> Any:
    x, g = tensors
    return _native.linear_scan(
        x,
        g,
        options["initial_state"],
        options["cu_seqlens"],
        options["log_gates"],
        output_final_state=True,
    )


def _fake_linear_scan(tensors: Sequence[Any], options: Options) -> Any:
    x, cu_seqlens = tensors[0], options["cu_seqlens"]
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((count, x.shape[2]), dtype=wide(x.dtype))


def _linear_scan_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_final_state, out, g = tensors
    return _native.linear_scan_backward(
        torch.zeros_like(out) if d_out is None else d_out,
        d_final_state,
        out,
        g,
        options["initial_state"],
        options["cu_seqlens"],
        options["log_gates"],
        options["wrt"],
    )


def _fake_linear_scan_backward(tensors: Sequence[Any], options: Options) -> Any:
    # Gradients of inputs are like outputs.
    return fake_gradients(options | dict(zip(("x", "g"), tensors[2:], strict=True)))


def _linear_scan_call(
    gradients: Sequence[Any], results: Sequence[Any], tensors: Sequence[Any], _options: Options
) -> Sequence[Any]:
    return (*gradients, *results, tensors[1])


LINEAR_SCAN_BACKWARD = Operator(
    name="linear_scan_backward",
    tensors=("d_out?", "d_final_state?", "out", "g"),
    optional=("initial_state", "cu_seqlens"),
    others={"log_gates": "bool"} | WRT,
    differentiable=frozenset(),
    returns="Tensor[]",
    compute=_linear_scan_backward,
    fake=_fake_linear_scan_backward,
    derivative=None,
    missing=NO_SECOND,
)
LINEAR_SCAN = Operator(
    name="linear_scan",
    tensors=("x", "g"),
    optional=("initial_state", "cu_seqlens"),
    others={"log_gates": "bool"},
    differentiable=frozenset({"x", "g", "initial_state"}),
    returns="(Tensor out, Tensor final_state)",
    compute=_linear_scan,
    fake=_fake_linear_scan,
    derivative=LINEAR_SCAN_BACKWARD,
    autocast=frozenset({"x"}),
    kept=(0,),
    derivative_call=_linear_scan_call,
    missing="",
)
OPERATORS = (SELECTIVE_SCAN, SELECTIVE_SCAN_BACKWARD, LINEAR_SCAN, LINEAR_SCAN_BACKWARD)
