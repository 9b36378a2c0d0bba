"""The rows of short convolutions in the table of operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad import _native
from subquad.torch.operator_row import NO_SECOND, WRT, Operator, Options, fake_gradients

_OPTIONAL = ("bias", "residual", "initial_state", "seq_idx", "cu_seqlens")
_OTHERS = {"silu": "bool", "tokens_first": "bool", "full_state": "bool"}


def _causal_conv1d(tensors: Sequence[Any], options: Options) -> Any:
    x, weight = tensors
    return _native.causal_conv1d(x, weight, options, output_final_state=True)


def _fake_causal_conv1d(tensors: Sequence[Any], options: Options) -> Any:
    x, weight = tensors
    bounds = options["cu_seqlens"]
    states = x.shape[0] if bounds is None else bounds.shape[0] - 1
    channels, width = weight.shape
    state = (states, channels, width if options["full_state"] else width - 1)
    return x.new_empty(x.shape), x.new_empty(state)


def _causal_conv1d_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_final_state, x, weight = tensors
    d_out = torch.zeros_like(x) if d_out is None else d_out
    names = [name for name in options["wrt"] if name != "residual"]
    found = _native.causal_conv1d_backward(d_out, d_final_state, x, weight, names, options)
    gradients = dict(zip(names, found, strict=True))
    if "residual" in options["wrt"]:
        # A copy: results of operators are not among their arguments.
        gradients["residual"] = d_out.clone(memory_format=torch.contiguous_format)
    # A tuple: autograd takes no list for results.
    return tuple(gradients[name] for name in options["wrt"])


def _fake_causal_conv1d_backward(tensors: Sequence[Any], options: Options) -> Any:
    return fake_gradients(options | {"x": tensors[2], "weight": tensors[3]})


CAUSAL_CONV1D_BACKWARD = Operator(
    name="causal_conv1d_backward",
    tensors=("d_out?", "d_final_state?", "x", "weight"),
    optional=_OPTIONAL,
    others=_OTHERS | WRT,
    differentiable=frozenset(),
    returns="Tensor[]",
    compute=_causal_conv1d_backward,
    fake=_fake_causal_conv1d_backward,
    derivative=None,
    missing=NO_SECOND,
)
CAUSAL_CONV1D = Operator(
    name="causal_conv1d",
    tensors=("x", "weight"),
    optional=_OPTIONAL,
    others=_OTHERS,
    differentiable=frozenset({"x", "weight", "bias", "residual", "initial_state"}),
    returns="(Tensor out, Tensor final_state)",
    compute=_causal_conv1d,
    fake=_fake_causal_conv1d,
    derivative=CAUSAL_CONV1D_BACKWARD,
    kept=(),
    autocast=frozenset({"x", "weight", "bias", "residual", "initial_state"}),
    missing="",
)
OPERATORS = (CAUSAL_CONV1D, CAUSAL_CONV1D_BACKWARD)
