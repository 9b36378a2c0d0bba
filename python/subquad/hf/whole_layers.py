"""Layers of gated delta rules and of KDA, computed as a whole.

Between the functions that `subquad.hf.fallbacks` has operators for, transformers' layers put heads in order, join and split
projections, copy what the convolution has seen, and end with a norm that is gated. A layer that is known here reads projections
where they lie, keeps both states in place, convolves pieces of a prompt from the state before them, and ends with
`subquad.ops.rms_norm_gated`.

Layers are known by what they are made of, and by a trial: pieces of a padded prompt and a single token after it, with a cache,
against the `forward` of the layer's class. Calls that need gradients are computed function by function, as are those under
autocast, of caches that record the past (speculative decoding), of packed sequences, and where something hooks into the
convolution or the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import unwrap
from typing import Any

import torch

from subquad import ops
from subquad.hf.delta_layers import PARAMETERS, Kind, Projected
from subquad.hf.interface import names_in
from subquad.hf.recurrent_arguments import beside, needs_grad, parameter_names, why_refused, wide
from subquad.hf.tracing import why_unreadable
from subquad.hf.trials import same_results, sines

_MAX_HEAD_DIM = 1024
# Tokens of a batch in a piece of a long prompt, as in `row_chunks`: what lies between its matrix products is memory that the piece
# before it has used.
_ROWS = 2048
# The recurrence works in chunks of this or less: pieces that are multiples of it change no rounding.
_CHUNK = 64
_SILU = ("silu", "swish")
_GATES = ("silu", "swish", "sigmoid")

# All that `forward` of such layers refers to. Whatever else one refers to, it computes something that is not known here.
_ORDINARY = frozenset(
    {"A_log", "F", "activation", "allow_neg_eigval", "apply_mask_to_padding_states", "bias", "cat", "conv1d"}
    | {"causal_conv1d_fn", "causal_conv1d_update", "chunk_kimi_delta_attention", "conv_kernel_size", "dt_bias"}
    | {"exp", "fix_query_key_value_ordering", "float", "float32", "forget_gate", "get_conv_state", "head_dim"}
    | {"get_recurrent_state", "head_k_dim", "head_v_dim", "is_recording_past", "key_dim", "layer_idx", "pop"}
    | {"qkv_dim", "recurrent_kimi_delta_attention", "reshape", "shape", "sigmoid", "softplus", "split", "squeeze"}
    | {"to", "torch", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "transpose"}
    | {"update_conv_state", "update_recurrent_state", "value_dim", "view", "weight"}
)  # fmt: skip
_NORM = frozenset(
    {"ACT2FN", "activation", "dtype", "float32", "mean", "pow", "rsqrt", "to", "torch", "variance_epsilon"}
    | {"weight"}
)  # fmt: skip


def _is_watched(module: torch.nn.Module) -> bool:
    """Whether something hooks into calls of a module that are not made here, or has replaced them."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or hasattr(module, "_hf_hook")


def why_in_parts(kind: Kind, module: Any, given: Mapping[str, Any]) -> str | None:
    """Returns why a call has to be computed function by function, as far as its arguments tell.

    Args:
        kind: How the layer is made.
        module: The layer.
        given: The arguments of `forward` by name.
    """
    hidden_states, cache = given.get("hidden_states"), given.get("cache")
    if not isinstance(hidden_states, torch.Tensor) or "cache_params" in given:
        return "arguments of older versions"
    if torch.is_grad_enabled() and needs_grad(hidden_states, *module.parameters()):
        return "gradients"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if _is_watched(module.conv1d) or _is_watched(getattr(module, kind.norm)):
        return "hooks on parts of the layer"
    if cache is not None and cache.is_recording_past(module.layer_idx):
        return "a cache that records the past"
    others = {name: one for name, one in given.items() if name not in PARAMETERS}
    return why_refused(others, hidden_states)


def compute(kind: Kind, module: Any, given: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[str, ...]] | str:
    """Computes `forward` of a layer.

    Args:
        kind: How it is made.
        module: The layer.
        given: The arguments by name.

    Returns:
        What `forward` returns, and the operators that computed it; or the reason why the call has to be computed function by
        function, with states as they were.
    """
    reason = why_in_parts(kind, module, given)
    if reason is not None:
        return reason
    hidden_states, cache, mask = given["hidden_states"], given.get("cache"), given.get("attention_mask")
    if mask is not None:
        hidden_states = (hidden_states * mask[:, :, None]).to(hidden_states.dtype)
    batch, tokens = hidden_states.shape[:2]
    past = state = None
    if cache is not None:
        past = cache.get_conv_state(module.layer_idx, state_idx=0)
        state = cache.get_recurrent_state(module.layer_idx, state_idx=0)
    single = past is not None and state is not None and tokens == 1
    pieces = _pieces(batch, tokens, module.conv_kernel_size)
    for start, end in pieces:
        projected = kind.project(module, hidden_states[:, start:end])
        reason = _why_unfit(kind, module, projected, past, state) if start == 0 else None
        if reason is not None:
            return reason
        mixed = _convolve(module, projected.mixed, past, single=single)
        has_next = cache is not None or end < tokens
        output, state = _recur(kind, module, projected, mixed, state, has_next=has_next, single=single)
        output = getattr(module, kind.output)(output.view(batch, end - start, -1))
        if start == 0:
            result = output if len(pieces) == 1 else output.new_empty(batch, tokens, output.shape[2])
        if len(pieces) > 1:
            result[:, start:end] = output
        if has_next and not single:
            # Older tokens would be copied, and dropped.
            past = projected.mixed[:, -module.conv_kernel_size :].transpose(1, 2)
    if cache is not None and state is not None:
        if not single:
            cache.update_conv_state(past, module.layer_idx, conv_kernel_size=module.conv_kernel_size)
        # Where it was written in place, this copies nothing.
        cache.update_recurrent_state(state.to(torch.float32), module.layer_idx)
    return result, kind.calls(single=single)


def _pieces(batch: int, tokens: int, width: int) -> list[tuple[int, int]]:
    """Returns where pieces of a long prompt begin and end: none shorter than a chunk of the recurrence, or a filter."""
    piece = max(_ROWS // batch, 1) // _CHUNK * _CHUNK
    if width > _CHUNK or tokens < piece + _CHUNK or piece == 0:
        return [(0, tokens)]
    starts = range(0, tokens - _CHUNK + 1, piece)
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def _recur(
    kind: Kind,
    module: Any,
    projected: Projected,
    mixed: torch.Tensor,
    state: torch.Tensor | None,
    *,
    has_next: bool,
    single: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns what the last projection gets, and the state after the last token.

    Args:
        kind: How the layer is made.
        module: The layer.
        projected: What comes before the recurrence.
        mixed: Queries, keys and values after the convolution, `[B, T, D]`.
        state: `[B, HV, K, V]`, or `None`: zeros. That of a single token is written in place if it can be.
        has_next: Whether there are tokens to come.
        single: Whether it is a single token with a state.
    """
    batch, tokens = mixed.shape[:2]
    dtype = mixed.dtype
    (key_heads, key_dim), (heads, head_dim) = kind.key_heads(module), kind.value_heads(module)
    widths = [key_heads * key_dim, key_heads * key_dim, heads * head_dim]
    query, key, value = torch.split(mixed, widths, -1)
    beta = projected.b.sigmoid()
    if getattr(module, "allow_neg_eigval", False):
        beta = beta * 2.0
    initial = None if state is None else state.to(wide(dtype))
    options: dict[str, Any] = {"inplace_final_state": initial.is_contiguous()} if single else {}  # type: ignore[union-attr]
    output, final = getattr(ops, kind.step if single else kind.chunk)(
        query.view(batch, tokens, key_heads, key_dim),
        key.view(batch, tokens, key_heads, key_dim),
        value.view(batch, tokens, heads, head_dim),
        g=beside(projected.g, dtype),
        beta=beside(beta, dtype),
        initial_state=initial,
        output_final_state=has_next,
        use_qk_l2norm_in_kernel=True,
        **options,
    )
    norm, z = getattr(module, kind.norm), projected.z
    normed: torch.Tensor = ops.rms_norm_gated(
        output.view(z.shape), z, norm.weight, None, norm.activation, eps=norm.variance_epsilon
    )
    return normed, final


def _why_unfit(
    kind: Kind, module: Any, projected: Projected, past: torch.Tensor | None, state: torch.Tensor | None
) -> str | None:
    """Returns why operators do not take what was projected, or the states of a cache."""
    mixed, bias = projected.mixed, module.conv1d.bias
    parameters = [module.conv1d.weight, getattr(module, kind.norm).weight, *([] if bias is None else [bias])]
    given = [mixed, projected.z, projected.b, projected.g, *parameters]
    given += [one for one in (past, state) if one is not None]
    reason = next(filter(None, map(why_unreadable, given)), None)
    if reason is not None:
        return reason
    fits = projected.z.dtype == mixed.dtype and (past is None or past.dtype == mixed.dtype)
    fits = fits and all(one.dtype in (mixed.dtype, wide(mixed.dtype)) for one in parameters)
    return None if fits else "dtypes that differ"


def _convolve(module: Any, mixed: torch.Tensor, past: torch.Tensor | None, *, single: bool) -> torch.Tensor:
    """Returns the convolution of `[B, T, D]`, after `[B, D, S]`, which a single token is written to."""
    weight, bias, activation = module.conv1d.weight.squeeze(1), module.conv1d.bias, module.activation
    if single:
        output: torch.Tensor = ops.causal_conv1d_update(mixed[:, 0], past, weight, bias, activation)
        return output[:, None]
    before = None if past is None else past[:, :, past.shape[2] - weight.shape[1] + 1 :]
    output = ops.causal_conv1d_fn(
        mixed.transpose(1, 2), weight, bias, initial_states=before, activation=activation
    )
    return output.transpose(1, 2)


def why_not_whole(kind: Kind, module: Any, original: Callable[..., Any]) -> str | None:
    """Returns why only functions of a layer are replaced; `None` where it computes what `compute` does, which is tried out.

    Args:
        kind: How it is made.
        module: The layer.
        original: Its `forward`, with the operators in the place of its functions.
    """
    norm = getattr(module, kind.norm)
    if parameter_names(type(module).forward) != ("self", *PARAMETERS):
        return "its forward has other parameters than those known"
    allowed = _ORDINARY | {*kind.children, kind.norm, kind.output}
    if not (
        names_in(unwrap(type(module).forward)) <= allowed and names_in(unwrap(type(norm).forward)) <= _NORM
    ):
        return "its forward refers to more than is known"
    reason = why_refused({}, module.conv1d.weight)
    if reason is not None:
        return reason
    try:
        widths = (kind.key_heads(module)[1], kind.value_heads(module)[1])
        if module.activation not in _SILU or norm.activation not in _GATES or max(widths) > _MAX_HEAD_DIM:
            return "activations or widths of heads that operators do not have"
        with torch.no_grad():
            same = _gives_the_same(kind, module, original)
    # Whatever it raises, it is not a layer known here.
    except Exception as error:
        return f"a trial raised {type(error).__name__}"
    return None if same else "a trial gave other results"


def _gives_the_same(kind: Kind, module: Any, original: Callable[..., Any]) -> bool:
    """Compares pieces of a prompt, padded on the left, and a token after it; and the states after them."""
    from transformers.cache_utils import Cache, LinearAttentionLayer

    weight = module.conv1d.weight
    width = getattr(module, kind.output).out_features
    dtype = getattr(module, kind.norm).weight.dtype
    states = sines(2, 9, width, like=weight).to(dtype)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = False
    caches = [Cache(layers=[LinearAttentionLayer() for _ in range(module.layer_idx + 1)]) for _ in range(2)]
    for start, end in ((0, 5), (5, 8), (8, 9)):
        given = {"hidden_states": states[:, start:end], "attention_mask": mask[:, start:end]}
        computed = compute(kind, module, {**given, "cache": caches[0]})
        if isinstance(computed, str):
            return False
        expected = original(module, **given, cache=caches[1])
        found, wanted = (
            (cache.get_conv_state(module.layer_idx), cache.get_recurrent_state(module.layer_idx))
            for cache in caches
        )
        if not same_results((computed[0], *found), (expected, *wanted)):
            return False
    return True
