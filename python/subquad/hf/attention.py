"""The attention function that transformers calls, and when the original has to compute instead."""

from __future__ import annotations

from typing import Any

import torch

from subquad.hf.delegate import Binding, Call, Original, binding_of, delegate, stray_binding
from subquad.hf.eager_probe import SEMANTIC, computes_attention, extras_of
from subquad.hf.mla import Latents, LatentStates, expanded, latents_to_read
from subquad.hf.structured_mask import CallMask, StructuredMask
from subquad.hf.tracing import PLAIN_TYPES, is_tracing, why_unreadable
from subquad.ops.exact import attention

MAX_HEAD_DIM = 1024
_RANK = 4
_SCALINGS = (float, int, type(None))
_TENSORS = (*PLAIN_TYPES, LatentStates)

# Arguments that neither "eager" nor "sdpa" gives a meaning: notes for other implementations, and requests for
# outputs of the model. Arguments that are in no list are delegated.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "grid_thw",
        "image_sizes",
        "input_ids",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "max_new_tokens",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    }
)
# Arguments that are looked at, each in its place below.
_READ = frozenset({"dropout", "is_causal", "output_attentions", "scaling", "sliding_window", *SEMANTIC})
# Arguments that change the result and are not implemented yet.
_NOT_IMPLEMENTED = frozenset({"block_indices", "cache", "indices"})
# What SDPA ignores: the model gives it to implementations that it knows to use it.
_IGNORED_BY_SDPA = ("s_aux", "sinks")


def _is_softcap(value: Any) -> bool:
    return value is None or (type(value) in _SCALINGS and 0 < value < float("inf"))


def _refused_argument(call: Call, *, wants_weights: bool) -> str | None:
    kwargs = call.kwargs
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS or name in _READ:
            continue
        return name if name in _NOT_IMPLEMENTED else f"{name} (unknown keyword argument)"
    dropout = kwargs.get("dropout")
    if dropout and not (type(dropout) in _SCALINGS and 0 < dropout < 1):
        return "dropout that is no number from 0 to below 1"
    scaling = kwargs.get("scaling")
    # Some models compute it on tensors of one element.
    is_element = isinstance(scaling, torch.Tensor) and scaling.numel() == 1 and not scaling.requires_grad
    if type(scaling) not in _SCALINGS and not is_element:
        return f"scaling of type {type(scaling).__name__}"
    if not _is_softcap(kwargs.get("softcap")):
        return "softcap that is no positive number"
    wanted = kwargs.get("output_attentions")
    return "output_attentions" if (wants_weights if wanted is None else wanted) else None


def _refused_tensors(call: Call) -> str | None:
    extras = extras_of(call.kwargs)
    added = [one for one in (extras.sinks, extras.position_bias) if one is not None]
    reasons = (why_unreadable(one, _TENSORS) for one in (call.query, call.key, call.value, *added))
    return next(filter(None, reasons), None)


def _refused_shapes(call: Call) -> str | None:
    query, key, value = call.query.shape, call.key.shape, call.value.shape
    reason = None
    if not len(query) == len(key) == len(value) == _RANK:
        reason = "tensors that are not 4-dimensional"
    elif key[:3] != value[:3] or key[0] != query[0] or key[3] != query[3]:
        reason = "shapes that broadcast"
    elif 0 in query or 0 in key or 0 in value:
        reason = "empty tensors"
    elif query[1] % key[1]:
        reason = "query heads that are no multiple of the key heads"
    elif max(query[3], value[3]) > MAX_HEAD_DIM:
        reason = f"head_dim above {MAX_HEAD_DIM}"
    return reason


def _refused_mask(mask: Any) -> str | None:
    if not isinstance(mask, torch.Tensor):
        return f"mask of type {type(mask).__name__}"
    if mask.device.type != "cpu":
        return f"mask on device {mask.device.type}"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"mask of dtype {str(mask.dtype).removeprefix('torch.')}"
    return None


def _why_delegate(binding: Binding, call: Call) -> str | None:
    """Returns why the original has to compute a call, or `None` if subquad can, whatever the mask means."""
    if binding.is_stray:
        return "another model with the same configuration"
    if type(call.query) in PLAIN_TYPES and is_tracing(call.query):
        return "tracing"
    reason = (
        _refused_argument(call, wants_weights=binding.wants_weights)
        or _refused_tensors(call)
        or _refused_shapes(call)
    )
    return reason or _refused_meaning(binding.original, call)


def _refused_meaning(original: Original, call: Call) -> str | None:
    """Returns why the original computes something else than subquad with the same arguments."""
    given = [name for name in SEMANTIC if call.kwargs.get(name) is not None]
    if original.name != "eager":
        return next((name for name in given if name in _IGNORED_BY_SDPA), None)
    if original.seam.is_ordinary and not given:
        return None
    if call.kwargs.get("dropout"):
        # A trial would not tell what it drops.
        return "dropout in an eager attention of its own"
    heads = (call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])
    if original.seam.eager is None or not computes_attention(
        call.module, original.seam.eager, heads, call.kwargs
    ):
        return ", ".join(given) or "an eager attention of its own"
    return None


def _without_mask(original: Original, call: Call) -> CallMask | str:
    """Returns what a missing mask means to the original, or why subquad cannot express it."""
    q_length, visible = call.query.shape[2], call.key.shape[2]
    causal = original.name == "sdpa" and call.is_causal
    if causal:
        # SDPA aligns top-left. Keys beyond are the places of a static cache that are not filled yet.
        if q_length > visible:
            return "more causal queries than keys"
        visible = q_length
    window = call.kwargs.get("sliding_window")
    # The original ignores this argument: it relies on the mask, which here has no window.
    if isinstance(window, int) and window < visible:
        return "sliding_window"
    return CallMask(causal, visible, None)


def _with_tensor(mask: torch.Tensor, call: Call) -> CallMask:
    """Returns the mask as the bias of a call."""
    kv_length = call.key.shape[2]
    # Older eager functions cut the masks of static caches to the keys.
    mask = mask[..., :kv_length] if mask.shape[-1] > kv_length else mask
    accumulator = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    if mask.dtype not in (torch.bool, accumulator):
        mask = mask.to(call.query.dtype)
    if mask.dtype == torch.bool and mask.ndim == _RANK and mask.shape[2:] == (1, kv_length):
        # When a static cache is decoded, most keys are places not filled yet, and reading those takes time.
        seen = mask.flatten(0, 2).any(0).nonzero()
        kv_length = int(seen[-1]) + 1 if len(seen) else 1
        mask = mask[..., :kv_length]
    return CallMask(causal=False, visible=kv_length, bias=mask)


def _origin(call: Call) -> str:
    window = call.kwargs.get("sliding_window")
    is_windowed = isinstance(window, int) and window < call.key.shape[2]
    return "sliding_window" if is_windowed else "mask of the model"


def _under_autocast(call: Call) -> Call:
    """Casts as autocast does for SDPA."""
    if not torch.is_autocast_enabled("cpu"):
        return call
    dtype = torch.get_autocast_dtype("cpu")
    query, key, value = (
        one if one.dtype == torch.float64 else one.to(dtype) for one in (call.query, call.key, call.value)
    )
    return call._replace(query=query, key=key, value=value)


def _express(binding: Binding, call: Call) -> CallMask | str:
    """Returns the mask in arguments of `subquad.attention`, or why the original has to compute the call."""
    reason = _why_delegate(binding, call)
    if reason is not None:
        return reason
    if call.mask is None:
        return _without_mask(binding.original, call)
    mask = call.mask
    if isinstance(mask, StructuredMask):
        structured = mask.for_call(call.query.shape[2], call.key.shape[2])
        if structured is not None:
            return structured
        mask = mask.dense()
    return _refused_mask(mask) or _with_tensor(mask, call)


def _dropout(original: Original, call: Call) -> float:
    """Returns the probability; eager functions leave dropout to modules that are being trained."""
    if original.name == "eager" and not call.module.training:
        return 0.0
    return float(call.kwargs.get("dropout") or 0.0)


def _compute(call: Call, mask: CallMask, latents: Latents | None, dropout_p: float) -> torch.Tensor:
    scale = call.kwargs.get("scaling")
    scale = scale if scale is None else float(scale)
    if latents is not None:
        query, key, value = latents.absorb(call.query, mask.visible)
        # The default is that of the queries as they came.
        scale = call.query.shape[3] ** -0.5 if scale is None else scale
    else:
        query, key, value = call.query, call.key, call.value
        if mask.visible < key.shape[2]:
            key, value = key[:, :, : mask.visible], value[:, :, : mask.visible]
    extras = extras_of(call.kwargs)
    sinks = extras.sinks
    if sinks is not None and sinks.dtype not in (torch.float32, query.dtype):
        sinks = sinks.to(torch.float32)
    output: torch.Tensor = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=mask.causal,
        window_size=mask.window_size,
        mask=mask.mask,
        scale=scale,
        bias=_with_position_bias(mask.bias, extras.position_bias, mask.visible, query.dtype),
        softcap=extras.softcap,
        sinks=sinks,
        dropout_p=dropout_p,
    )
    return output if latents is None else latents.release(output)


def _with_position_bias(
    bias: torch.Tensor | None, position_bias: torch.Tensor | None, visible: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns a mask and a bias of positions as one."""
    if position_bias is None:
        return bias
    position_bias = position_bias[..., :visible]
    if position_bias.dtype not in (torch.float32, dtype):
        position_bias = position_bias.to(dtype)
    if bias is None:
        return position_bias
    if bias.dtype == torch.bool:
        return position_bias.masked_fill(~bias, float("-inf"))
    return position_bias + bias


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of subquad in transformers' `AttentionInterface`.

    Args:
        module: The module that calls attention.
        query: `[B, H, Sq, D]`.
        key: `[B, Hkv, Sk, D]`.
        value: `[B, Hkv, Sk, Dv]`.
        attention_mask: A `StructuredMask`, a tensor broadcastable to `[B, H, Sq, Sk]` (bool, where False
            hides a key, or what is added to the scores), or `None`, which means what it means to the original
            implementation.
        **kwargs: `scaling`, and others; calls with arguments that are not implemented go to the original.

    Returns:
        The output, `[B, Sq, H, Dv]`, and `None`, or what the original returns. A query that sees no key gives
        zeros.

    Raises:
        RuntimeError: The module's configuration is that of no patched model.
        NotImplementedError: Neither subquad nor the original can compute the call.
    """
    binding = binding_of(module) or stray_binding(module)
    call = Call(module, query, key, value, attention_mask, kwargs)
    if torch.compiler.is_compiling():
        for tally in binding.tallies:
            tally.compiled = True
        return delegate(binding.original, call)
    latents = latents_to_read(call)
    call = _under_autocast(call if latents is not None else expanded(call))
    mask = _express(binding, call)
    if isinstance(mask, str):
        for tally in binding.tallies:
            tally.delegated[mask, binding.original.name] += 1
        return delegate(binding.original, expanded(Call(module, query, key, value, attention_mask, kwargs)))
    is_dense = mask.bias is not None and mask.bias.ndim > 1 and mask.bias.shape[-2] > 1
    for tally in binding.tallies:
        tally.computed += 1
        tally.on_latents += latents is not None
        if is_dense:
            tally.dense[_origin(call)] += 1
    return _compute(call, mask, latents, _dropout(binding.original, call)), None
