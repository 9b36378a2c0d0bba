"""What stands in for the extension where PyTorch has to know of a call.

`subquad.ops` calls the extension itself wherever it can, and this module where it cannot: within `torch.compile` and
`torch.export`, under autocast, for tensors that require grad, within transforms of `torch.func`, and for fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad import _native
from subquad.torch import library
from subquad.torch.attention_operators import ATTENTION, ATTENTION_VARLEN
from subquad.torch.convolution_operators import CAUSAL_CONV1D
from subquad.torch.functions import apply
from subquad.torch.gated_norm import rms_norm_gated
from subquad.torch.operator_row import Operator, Options
from subquad.torch.plain import Route, route
from subquad.torch.recurrent_operators import RECURRENT, with_defaults
from subquad.torch.scan_calls import linear_scan, selective_scan
from subquad.torch.sdpa import as_attention

__all__ = [
    "attention",
    "attention_as_it_is",
    "attention_varlen",
    "causal_conv1d",
    "causal_conv1d_as_it_is",
    "linear_scan",
    "recurrent",
    "recurrent_as_it_is",
    "rms_norm_gated",
    "scaled_dot_product_attention",
    "selective_scan",
]

_CONSTANTS = ("scale", "length_scale", "softcap")


def _refuse_gradient(name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: its gradient is not implemented; pass {name}.detach(), or scale q in its place"
        )


def _refused_out(function: str, argument: str, tensors: Sequence[Any]) -> Exception:
    if torch.is_grad_enabled() and any(getattr(one, "requires_grad", False) for one in tensors):
        return RuntimeError(
            f"{function}(): functions with {argument}=... arguments don't support automatic differentiation, but one of the "
            "arguments requires grad."
        )
    return NotImplementedError(
        f"{argument}: not supported within torch.compile and torch.func, and for fake tensors"
    )


def _with_seed(options: Options) -> Options:
    """Returns the options with a seed of dropout from PyTorch's generator where one is needed and none is given."""
    if not options["dropout_p"] or options["dropout_seed"] is not None:
        return options
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "dropout_seed: expected an integer within torch.compile and torch.export, which cannot draw one; pass "
            "torch.randint(2**63 - 1, ()).item() from outside"
        )
    return options | {"dropout_seed": int(torch.randint(2**63 - 1, ()))}


def _compute(
    operator: Operator, tensors: Sequence[Any], options: Options, way: Route, names: Sequence[str]
) -> Any:
    if way is Route.OPERATOR:
        return library.call(operator, tensors, options)
    window_size = options.get("window_size")
    if window_size is not None and isinstance(window_size, torch.Tensor):
        # The backward pass reads it again.
        options = options | {"window_size": window_size.clone()}
    return apply(operator, tensors, options, names)


def attention_as_it_is(q: Any, k: Any, v: Any, options: Options, *, return_lse: bool, out: Any) -> Any:
    """Computes `attention`, but does not cast."""
    for name in _CONSTANTS:
        if options[name] is not None:
            _refuse_gradient(name, options[name])
    options = _with_seed(options)
    names = ATTENTION.tensors_among(options)
    tensors = arguments = (q, k, v)
    if names or out is not None:
        arguments = (*tensors, *[options[name] for name in names], out)
    way = route(arguments)
    if way is Route.EXTENSION:
        return _native.attention(q, k, v, **options, return_lse=return_lse, out=out)
    if out is not None:
        raise _refused_out("attention", "out", arguments)
    results = _compute(ATTENTION, tensors, options, way, names)
    return results if return_lse else results[0]


def attention_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, options: Options, *, return_lse: bool
) -> Any:
    """Computes what `subquad.attention_varlen` asks of the extension."""
    if _casts():
        q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
        with torch.autocast("cpu", enabled=False):
            return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, options, return_lse=return_lse)
    if options["softcap"] is not None:
        _refuse_gradient("softcap", options["softcap"])
    if options["softmax_scale"] is not None:
        _refuse_gradient("softmax_scale", options["softmax_scale"])
    names = ATTENTION_VARLEN.tensors_among(options)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    way = route((*tensors, *[options[name] for name in names]))
    if way is Route.EXTENSION:
        return _native.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options, return_lse=return_lse)
    results = _compute(ATTENTION_VARLEN, tensors, options, way, names)
    return results if return_lse else results[0]


def _casts() -> bool:
    """Whether autocast is at work here; custom operators in compiled code cast themselves."""
    return not torch.compiler.is_compiling() and torch.is_autocast_enabled("cpu")


def attention(q: Any, k: Any, v: Any, options: Options, *, return_lse: bool, out: Any) -> Any:
    """Computes `subquad.attention` from its arguments, masks and normalizers lowered."""
    if not _casts():
        return attention_as_it_is(q, k, v, options, return_lse=return_lse, out=out)
    q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
    options = options | {"bias": library.autocast(options["bias"])}
    with torch.autocast("cpu", enabled=False):
        return attention_as_it_is(q, k, v, options, return_lse=return_lse, out=out)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,  # noqa: FBT001 - PyTorch's order of arguments
    scale: float | None,
    enable_gqa: bool,  # noqa: FBT001 - PyTorch's order of arguments
) -> Any:
    """Computes `subquad.scaled_dot_product_attention` by way of `attention`."""
    if _casts():
        query, key, value, attn_mask = map(library.autocast, (query, key, value, attn_mask))
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    way = route((query, key, value, attn_mask))
    if way is Route.EXTENSION and dropout_p == 0:
        return _native.scaled_dot_product_attention(*arguments)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None when is_causal=True, got a mask")
    try:
        mapped = as_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        options = mapped.options | {"dropout_p": dropout_p}
        out = attention_as_it_is(mapped.q, mapped.k, mapped.v, options, return_lse=False, out=None)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        if way is not Route.OPERATOR:
            # What the extension says has the names of PyTorch's signature.
            with torch.no_grad():
                _native.scaled_dot_product_attention(
                    query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa
                )
        raise
    # `[B, L, H, Ev]` again as the leading axes and heads.
    return out.transpose(1, 2).reshape(mapped.shape)


def recurrent_as_it_is(
    q: Any, k: Any, v: Any, options: Options, *, output_final_state: bool
) -> tuple[Any, Any | None]:
    """Computes what `subquad.ops.recurrent` asks of the extension, but does not cast."""
    options = with_defaults(options)
    _refuse_gradient("scale", options["scale"])
    names = RECURRENT.tensors_among(options)
    arguments = (q, k, v, *[options[name] for name in names])
    way = route(arguments)
    if way is Route.EXTENSION:
        return _native.recurrent(q, k, v, options, output_final_state)
    if options.pop("inplace_final_state"):
        raise _refused_out("recurrent", "inplace_final_state", arguments)
    out, state = _compute(RECURRENT, (q, k, v), options, way, names)
    return out, state if output_final_state else None


def recurrent(
    q: Any, k: Any, v: Any, options: Options, *, output_final_state: bool
) -> tuple[Any, Any | None]:
    """Computes what `subquad.ops.recurrent` asks of the extension.

    Autocast casts the rows; gates, `beta` and states stay what they are.
    """
    if not _casts():
        return recurrent_as_it_is(q, k, v, options, output_final_state=output_final_state)
    q, k, v = library.autocast(q), library.autocast(k), library.autocast(v)
    options = options | {name: library.autocast(options.get(name)) for name in ("a", "b")}
    with torch.autocast("cpu", enabled=False):
        return recurrent_as_it_is(q, k, v, options, output_final_state=output_final_state)


def causal_conv1d_as_it_is(
    x: Any, weight: Any, options: Options, *, output_final_state: bool
) -> tuple[Any, Any]:
    """Computes what `subquad.ops.convolution` asks of the extension, but does not cast."""
    names = CAUSAL_CONV1D.tensors_among(options)
    final_state = options["final_state"]
    arguments = (x, weight, *[options[name] for name in names], final_state)
    way = route(arguments)
    if way is Route.EXTENSION:
        return _native.causal_conv1d(x, weight, options, output_final_state)
    if final_state is not None:
        raise _refused_out("causal_conv1d_fn", "final_states_out", arguments)
    for name in CAUSAL_CONV1D.optional:
        if options[name] is not None and name not in names:
            raise TypeError(f"{name}: expected a PyTorch tensor as x is, got {type(options[name]).__name__}")
    options = {name: option for name, option in options.items() if name != "final_state"}
    out, state = _compute(CAUSAL_CONV1D, (x, weight), options, way, names)
    return out, state if output_final_state else None


def causal_conv1d(x: Any, weight: Any, options: Options, *, output_final_state: bool) -> tuple[Any, Any]:
    """Computes what `subquad.ops.convolution` asks of the extension."""
    if not _casts():
        return causal_conv1d_as_it_is(x, weight, options, output_final_state=output_final_state)
    cast = {name: library.autocast(options[name]) for name in ("bias", "residual", "initial_state")}
    x, weight = library.autocast(x), library.autocast(weight)
    with torch.autocast("cpu", enabled=False):
        return causal_conv1d_as_it_is(x, weight, options | cast, output_final_state=output_final_state)
