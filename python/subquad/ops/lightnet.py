"""LightNet: linear attention to keys that are normalised over the tokens so far, by a softmax in each channel.

Source: You Only Scan Once, Qin et al. 2024.
"""

from __future__ import annotations

from typing import Any

from .additive_gates import averages, sums_before
from .inputs import Inputs, state_pair
from .namespace import cast
from .recurrent import recurrent, require
from .sequences import spans_of

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_lightnet(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: tuple[Any | None, Any | None] | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, tuple[Any | None, Any]]:
    """Computes LightNet's attention; see `subquad.ops.recurrent`.

    With `z_t = log(exp(z_{t-1}) + exp(k_t))`, `S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T` and
    `o_t = scale * S_t^T q_t`: channel `c` of the state is the average of the values so far with the weights `exp(k[c])`. Half
    types are computed in float32.

    Args:
        q: queries, `[B, T, H, K]`.
        k: logarithms of the weights, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        scale: factor of the outputs.
        initial_state: `(S, z)`, `[N, H, K, V]` and `[N, 1, H, K]`, either of which may be `None`.
        output_final_state: whether to return the final `S`.
        state_v_first: whether `S` is `[N, H, V, K]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state: `S` or `None`, and `z` in any case, `-inf` where there were no tokens.
    """
    require(q=q, k=k, v=v)
    given = Inputs("q", q, "B, T, H, K")
    batch, tokens, heads, width = q.shape
    k = given.alike("k", k, batch, tokens, heads, width)
    v = given.alike("v", v, batch, tokens, heads, "V")
    spans = spans_of(cu_seqlens, given, tokens)
    state, before = state_pair(initial_state, "S, z")
    if state is not None:
        of_head = (v.shape[3], width) if state_v_first else (width, v.shape[3])
        sequences = batch if spans is None else len(spans)
        state = given.beside("initial_state", state, sequences, heads, *of_head)
    before = sums_before(given, before, spans, heads, width)
    weights, gates, last = averages(given, k, spans, before)
    o, final = recurrent(
        cast(q, given.sums),
        weights,
        cast(v, given.sums),
        gk=gates,
        scale=scale,
        initial_state=state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
    )
    return cast(o, q.dtype), (final, last)


def fused_recurrent_lightnet(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: tuple[Any | None, Any | None] | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, tuple[Any | None, Any]]:
    """Computes what `chunk_lightnet` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]` and `[N, 1, H, K]`.
        output_final_state: see there.
        state_v_first: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return chunk_lightnet(q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens)
