"""The rows of the recurrent engine in the table of operators."""

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

_OPTIONAL = ("g", "gk", "g_gamma", "beta", "a", "b", "u", "initial_state", "cu_seqlens")
_OTHERS = {
    "scale": "float?",
    "chunk_size": "SymInt?",
    "delta": "bool",
    "step": "bool",
    "state_v_first": "bool",
    "use_qk_l2norm_in_kernel": "bool",
    "keep": "bool",
}


def with_defaults(options: Options) -> Options:
    """Returns all options of the engine: those given, and `None` or False for the others."""
    flags = [name for name, kind in _OTHERS.items() if kind == "bool"]
    return (
        dict.fromkeys((*_OPTIONAL, *_OTHERS))
        | dict.fromkeys((*flags, "inplace_final_state"), False)
        | options
    )


def reads_state(options: Options) -> bool:
    """Whether what is written depends on the state, so that the backward needs what the forward has kept."""
    return bool(options["delta"]) or options["a"] is not None


def _recurrent(tensors: Sequence[Any], options: Options) -> Any:
    q, k, v = tensors
    if options["keep"]:
        return _native.recurrent_and_kept(q, k, v, options)
    output_final_state = True
    return (*_native.recurrent(q, k, v, options, output_final_state), q.new_empty(0))


def _fake_recurrent(tensors: Sequence[Any], options: Options) -> Any:
    q, _, v = tensors
    bounds = options["cu_seqlens"]
    states = q.shape[0] if bounds is None else bounds.shape[0] - 1
    head = (q.shape[3], v.shape[3])
    state = (states, v.shape[2], *(head[::-1] if options["state_v_first"] else head))
    kept = q.new_empty(v.shape if options["keep"] else 0)
    return q.new_empty(v.shape), q.new_empty(state, dtype=wide(q.dtype)), kept


def _keys_first(state: Any, options: Options) -> Any:
    """Returns a state, or the gradient of one, with its axes as the extension's backward has them, or back."""
    return state.mT.contiguous() if state is not None and options["state_v_first"] else state


def _recurrent_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_final_state, kept, q, k, v = tensors
    if d_out is None:
        d_out = torch.zeros_like(v)
    if d_final_state is not None:
        d_final_state = _keys_first(d_final_state, options).contiguous()
    initial_state = _keys_first(options["initial_state"], options)
    # The form of the forward says nothing about that of the backward.
    given = options | {"initial_state": initial_state, "state_v_first": False, "step": False}
    if not reads_state(options):
        kept = None
    elif not options["keep"]:
        # Whoever called did not see that this would be asked for.
        kept = _native.recurrent_and_kept(q, k, v, given)[2]
    wrt = options["wrt"]
    gradients = _native.recurrent_backward(q, k, v, (d_out, d_final_state, kept), given, wrt)
    found = dict(zip(wrt, gradients, strict=True))
    if "g_gamma" in found:
        found["g_gamma"] = found["g_gamma"].sum((0, 1), dtype=torch.float64)
    if "initial_state" in found:
        found["initial_state"] = _keys_first(found["initial_state"], options)
    arguments = options | {"q": q, "k": k, "v": v}
    return tuple(found[name].to(arguments[name].dtype) for name in wrt)


def _fake_recurrent_backward(tensors: Sequence[Any], options: Options) -> Any:
    return fake_gradients(options | dict(zip(("q", "k", "v"), tensors[3:], strict=True)))


RECURRENT_BACKWARD = Operator(
    name="recurrent_backward",
    tensors=("d_out?", "d_final_state?", "kept", "q", "k", "v"),
    optional=_OPTIONAL,
    others=_OTHERS | WRT,
    differentiable=frozenset(),
    returns="Tensor[]",
    compute=_recurrent_backward,
    fake=_fake_recurrent_backward,
    derivative=None,
    missing=NO_SECOND,
)
RECURRENT = Operator(
    name="recurrent",
    tensors=("q", "k", "v"),
    optional=_OPTIONAL,
    others=_OTHERS,
    differentiable=frozenset({"q", "k", "v", "g", "gk", "g_gamma", "beta", "a", "b", "u", "initial_state"}),
    returns="(Tensor out, Tensor final_state, Tensor kept)",
    compute=_recurrent,
    fake=_fake_recurrent,
    derivative=RECURRENT_BACKWARD,
    kept=(2,),
    derivative_call=of_others_than_last,
    autocast=frozenset({"q", "k", "v", "a", "b"}),
    missing="",
)
OPERATORS = (RECURRENT, RECURRENT_BACKWARD)
