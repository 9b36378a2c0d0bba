"""Linear attention with one decay for all channels: a gate for each step, a constant for each head, or both absent.

Sources: gated linear attention with scalar gates, Yang et al. 2023 and Mamba-2, Dao and Gu 2024.
"""

from __future__ import annotations

from typing import Any

from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_simple_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None = None,
    g_gamma: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        g: log decay of each token, `[B, T, H]`. `None`: no decay.
        g_gamma: a constant for each head instead, `[H]`, float32, float64 or of q's dtype.
        scale: factor of the outputs.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        state_v_first: whether states are `[N, H, V, K]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state or `None`.
    """
    del cu_seqlens_cpu
    return recurrent(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
    )


def fused_chunk_simple_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None = None,
    g_gamma: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_simple_gla` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: `[B, T, H]`.
        g_gamma: `[H]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_simple_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None = None,
    g_gamma: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_simple_gla` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: `[B, T, H]`.
        g_gamma: `[H]`.
        scale: see there.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        reverse: whether sequences are read from the last token to the first.
        state_v_first: whether states are `[N, H, V, K]`.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        See there.
    """
    return recurrent(
        q,
        k,
        v,
        g=g,
        g_gamma=g_gamma,
        scale=scale,
        initial_state=initial_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
        unknown=kwargs,
    )


def parallel_simple_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Computes the outputs of `chunk_simple_gla`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: `[B, T, H]`.
        scale: see there.
        output_attentions: must be False.
        cu_seqlens: `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: see there.

    Returns:
        The outputs, `[B, T, H, V]`, and `None`.
    """
    del cu_seqlens_cpu
    refuse(output_attentions=output_attentions)
    o, _ = recurrent(
        q, k, v, g=g, scale=scale, cu_seqlens=cu_seqlens, output_final_state=False, unknown=kwargs
    )
    return o, None
