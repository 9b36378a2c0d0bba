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
from subquad.torch.functions import apply
from subquad.torch.operators import ATTENTION, ATTENTION_VARLEN, Operator, Options
from subquad.torch.plain import Route, route
from subquad.torch.scan_calls import linear_scan, selective_scan
from subquad.torch.sdpa import as_attention

__all__ = [
    "attention",
    "attention_as_it_is",
    "attention_varlen",
    "linear_scan",
    "scaled_dot_product_attention",
    "selective_scan",
]

_CONSTANTS = ("scale", "length_scale", "softcap")


def _refuse_gradient(name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: its gradient is not implemented; pass {name}.detach(), or scale q in its place"
        )


def _refused_out(tensors: Sequence[Any]) -> Exception:
    if torch.is_grad_enabled() and any(getattr(one, "requires_grad", False) for one in tensors):
        return RuntimeError(
            "attention(): functions with out=... arguments don't support automatic differentiation, but one of the "
            "arguments requires grad."
        )
    return NotImplementedError("out: not supported within torch.compile and torch.func, and for fake tensors")


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


def _names_of_tensors(operator: Operator, options: Options) -> list[str]:
    # Whether something is a tensor is a slow question.
    given = [(name, options[name]) for name in operator.optional if options[name] is not None]
    return [name for name, value in given if isinstance(value, torch.Tensor)] if given else []


def _compute(
    operator: Operator, tensors: Sequence[Any], options: Options, way: Route, names: Sequence[str]
) -> Any:
    if way is Route.OPERATOR:
        return library.call(operator, tensors, options)
    window_size = options["window_size"]
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
    names = _names_of_tensors(ATTENTION, options)
    tensors = arguments = (q, k, v)
    if names or out is not None:
        arguments = (*tensors, *[options[name] for name in names], out)
    way = route(arguments)
    if way is Route.EXTENSION:
        return _native.attention(q, k, v, **options, return_lse=return_lse, out=out)
    if out is not None:
        raise _refused_out(arguments)
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
    names = _names_of_tensors(ATTENTION_VARLEN, options)
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
