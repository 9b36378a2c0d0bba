"""Delta rules whose transitions are diagonal, or the identity, plus a matrix of low rank: what is read need not be what is written.

Source: the chunk form of transitions of low rank, Yang et al. 2024 (flash-linear-attention).
"""

from __future__ import annotations

from typing import Any

from .gates import check_lower_bound
from .recurrent import recurrent, refuse, require

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_dplr_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    gk: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: Any | None = None,
    lower_bound: float | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = (diag(exp(gk_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        a: what the state is read with before it decays, `[B, T, H, K]`, of q's dtype.
        b: where what was read is written to, `[B, T, H, K]`, of q's dtype.
        gk: log decays, `[B, T, H, K]`. `None`: no decay.
        scale: factor of the outputs.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        safe_gate: no effect: all gates are safe.
        chunk_size: a power of two from 16 on (above 64, chunks have 64 tokens); changes no result.
        disable_recompute: no effect.
        cp_context: must be `None`.
        lower_bound: promises that no gate is below; below 0, and without effect.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state or `None`.
    """
    del cu_seqlens_cpu, safe_gate, disable_recompute
    refuse(cp_context=cp_context)
    check_lower_bound(lower_bound)
    return _low_rank(
        q,
        k,
        v,
        a,
        b,
        gk=gk,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
        unknown=kwargs,
    )


def fused_recurrent_dplr_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    gk: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_dplr_delta_rule` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: `[B, T, H, K]`.
        b: `[B, T, H, K]`.
        gk: `[B, T, H, K]`.
        scale: see there.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        reverse: whether sequences are read from the last token to the first.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return _low_rank(
        q,
        k,
        v,
        a,
        b,
        gk=gk,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
    )


def chunk_iplr_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = (I + b_t a_t^T) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`: `chunk_dplr_delta_rule` without decay.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: `[B, T, H, K]`.
        b: `[B, T, H, K]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        cu_seqlens: `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: see there.

    Returns:
        See there.
    """
    del cu_seqlens_cpu
    return chunk_dplr_delta_rule(
        q, k, v, a, b, None, scale, initial_state, output_final_state, cu_seqlens, **kwargs
    )


def fused_recurrent_iplr_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_iplr_delta_rule` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: `[B, T, H, K]`.
        b: `[B, T, H, K]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return chunk_dplr_delta_rule(q, k, v, a, b, None, scale, initial_state, output_final_state, cu_seqlens)


def _low_rank(q: Any, k: Any, v: Any, a: Any, b: Any, **options: Any) -> tuple[Any, Any | None]:
    require(a=a, b=b)
    return recurrent(q, k, v, a=a, b=b, **options)
