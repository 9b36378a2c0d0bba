"""The rows of attention in the table of operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad import _native
from subquad.torch.operator_row import NO_SECOND, WRT, Operator, Options, fake_gradients, wide

_OPTIONAL = ("bias", "relative_bias", "alibi_slopes", "sinks", "scale", "length_scale")
_OTHERS = {
    "causal": "bool",
    "window_size": "int[]?",
    "scale": "float?",
    "softcap": "float?",
    "mask": "str?",
    "normalizer": "str?",
    "dropout_p": "float",
    "dropout_seed": "SymInt?",
}


def _attention(tensors: Sequence[Any], options: Options) -> Any:
    return _native.attention(*tensors, **options, return_lse=True)


def _fake_attention(tensors: Sequence[Any], options: Options) -> Any:
    q, _, v = tensors
    batch, length, heads, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3]))
    return out, q.new_empty((batch, heads, length), dtype=wide(q.dtype))


def _attention_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_lse, out, lse, q, k, v = tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    return _native.attention_backward(d_out, q, k, v, out, lse, d_lse, options["wrt"], options)


def _fake_attention_backward(tensors: Sequence[Any], options: Options) -> Any:
    return fake_gradients(options | dict(zip(("q", "k", "v"), tensors[4:7], strict=True)))


# What higher derivatives are implemented for, as the extension calls them.
_DIRECTIONS = ("q", "k", "v", "bias", "relative_bias")
_HIGHER = ("d_out", "d_lse", *_DIRECTIONS)
_NATIVE = {"d_out": "do", "d_lse": "dlse"}


def _directions(found: Options, what: str) -> list[Any]:
    """Returns tangents, or gradients of gradients, in order.

    Raises:
        NotImplementedError: there is one of something else.
    """
    for name, one in found.items():
        if one is not None and name not in _HIGHER:
            raise NotImplementedError(f"subquad::attention: {what} of {name} are not implemented; detach it")
    return [found.get(name) for name in _DIRECTIONS]


def _given(directions: Sequence[Any]) -> dict[str, Any]:
    return {name: one for name, one in zip(_DIRECTIONS, directions, strict=True) if one is not None}


def _attention_double_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_lse, out, lse, q, k, v = tensors[:7]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    names = [_NATIVE.get(name, name) for name in options["wrt"]]
    found = _native.attention_double_backward(
        d_out, q, k, v, out, lse, d_lse, _given(tensors[7:]), options, names
    )
    # A tuple: autograd takes no list for results.
    return tuple(found[name] for name in names)


def _fake_attention_double_backward(tensors: Sequence[Any], options: Options) -> Any:
    made = dict(zip(("d_out", "d_lse", "q", "k", "v"), tensors[2:7], strict=True))
    return [(options | made)[name].new_empty((options | made)[name].shape) for name in options["wrt"]]


def _attention_jvp(tensors: Sequence[Any], options: Options) -> Any:
    q, k, v, *directions = tensors
    return _native.attention_jvp(q, k, v, _given(directions), options)


def _double_backward_call(
    gradients: Sequence[Any], _results: Sequence[Any], tensors: Sequence[Any], options: Options
) -> Sequence[Any]:
    found = dict(zip(options["wrt"], gradients, strict=True))
    return (*tensors, *_directions(found, "second derivatives by way of the gradient"))


def _tangents_of_attention(tensors: Sequence[Any], options: Options, tangents: Options, compute: Any) -> Any:
    return compute(ATTENTION_JVP, (*tensors, *_directions(tangents, "forward-mode derivatives")), options)


def _tangents_of_gradients(tensors: Sequence[Any], options: Options, tangents: Options, compute: Any) -> Any:
    found = {name: one for name, one in tangents.items() if name not in ATTENTION_BACKWARD.follows}
    d_out, d_lse = found.pop("d_out", None), found.pop("d_lse", None)
    directions = _directions(found, "second derivatives along tangents")
    parts = []
    if any(one is not None for one in directions):
        _directions(dict.fromkeys(options["wrt"], True), "second derivatives")
        parts.append(compute(ATTENTION_DOUBLE_BACKWARD, (*tensors, *directions), options))
    if d_out is not None or d_lse is not None:
        # Gradients are linear in those of the results.
        parts.append(compute(ATTENTION_BACKWARD, (d_out, d_lse, *tensors[2:]), options))
    return [sum(of[1:], start=of[0]) for of in zip(*parts, strict=True)]


ATTENTION_JVP = Operator(
    name="attention_jvp",
    tensors=("q", "k", "v", *(f"t_{name}?" for name in _DIRECTIONS)),
    optional=_OPTIONAL,
    others=_OTHERS,
    differentiable=frozenset(),
    returns="(Tensor out, Tensor lse)",
    compute=_attention_jvp,
    fake=lambda tensors, options: _fake_attention(tensors[:3], options),
    derivative=None,
    missing="derivatives of forward-mode derivatives are not implemented",
)
ATTENTION_DOUBLE_BACKWARD = Operator(
    name="attention_double_backward",
    tensors=("d_out?", "d_lse?", "out", "lse", "q", "k", "v", *(f"u_{name}?" for name in _DIRECTIONS)),
    optional=_OPTIONAL,
    others=_OTHERS | WRT,
    differentiable=frozenset(),
    returns="Tensor[]",
    compute=_attention_double_backward,
    fake=_fake_attention_double_backward,
    derivative=None,
    missing="third derivatives are not implemented",
)
ATTENTION_BACKWARD = Operator(
    name="attention_backward",
    tensors=("d_out?", "d_lse?", "out", "lse", "q", "k", "v"),
    optional=_OPTIONAL,
    others=_OTHERS | WRT,
    differentiable=frozenset(_HIGHER),
    returns="Tensor[]",
    compute=_attention_backward,
    fake=_fake_attention_backward,
    derivative=ATTENTION_DOUBLE_BACKWARD,
    derivative_call=_double_backward_call,
    missing="",
    follows=frozenset({"out", "lse"}),
    forward_mode=_tangents_of_gradients,
)
ATTENTION = Operator(
    name="attention",
    tensors=("q", "k", "v"),
    optional=_OPTIONAL,
    others=_OTHERS,
    differentiable=frozenset({"q", "k", "v", "bias", "relative_bias", "alibi_slopes", "sinks"}),
    returns="(Tensor out, Tensor lse)",
    compute=_attention,
    fake=_fake_attention,
    derivative=ATTENTION_BACKWARD,
    missing="",
    forward_mode=_tangents_of_attention,
)


_OPTIONAL_VARLEN = ("alibi_slopes", "sinks", "block_table")
_OTHERS_VARLEN = {
    "max_seqlen_q": "SymInt?",
    "max_seqlen_k": "SymInt?",
    "softmax_scale": "float?",
    "causal": "bool",
    "window_size": "int[]?",
    "softcap": "float?",
}


def _attention_varlen(tensors: Sequence[Any], options: Options) -> Any:
    q, k, v, cu_seqlens_q, cu_seqlens_k = tensors
    return _native.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options, return_lse=True)


def _fake_attention_varlen(tensors: Sequence[Any], options: Options) -> Any:
    q, _, v = tensors[:3]
    total, heads, _ = q.shape
    return q.new_empty((total, heads, v.shape[-1])), q.new_empty((heads, total), dtype=wide(q.dtype))


def _attention_varlen_backward(tensors: Sequence[Any], options: Options) -> Any:
    d_out, d_lse, out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k = tensors
    if options["block_table"] is not None:
        raise NotImplementedError("block_table: gradients of keys and values in pages are not implemented")
    return _native.attention_varlen_backward(
        torch.zeros_like(out) if d_out is None else d_out,
        q,
        k,
        v,
        out,
        lse,
        d_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        options["wrt"],
        options["softmax_scale"],
        options["causal"],
        options["window_size"],
        options["softcap"],
        options["alibi_slopes"],
        options["sinks"],
    )


ATTENTION_VARLEN_BACKWARD = Operator(
    name="attention_varlen_backward",
    tensors=("d_out?", "d_lse?", "out", "lse", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    optional=_OPTIONAL_VARLEN,
    others=_OTHERS_VARLEN | WRT,
    differentiable=frozenset(),
    returns="Tensor[]",
    compute=_attention_varlen_backward,
    fake=_fake_attention_backward,
    derivative=None,
    missing=NO_SECOND,
)
ATTENTION_VARLEN = Operator(
    name="attention_varlen",
    tensors=("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"),
    optional=_OPTIONAL_VARLEN,
    others=_OTHERS_VARLEN,
    differentiable=frozenset({"q", "k", "v", "alibi_slopes", "sinks"}),
    returns="(Tensor out, Tensor lse)",
    compute=_attention_varlen,
    fake=_fake_attention_varlen,
    derivative=ATTENTION_VARLEN_BACKWARD,
    missing="",
)
OPERATORS = (
    ATTENTION,
    ATTENTION_BACKWARD,
    ATTENTION_DOUBLE_BACKWARD,
    ATTENTION_JVP,
    ATTENTION_VARLEN,
    ATTENTION_VARLEN_BACKWARD,
)
