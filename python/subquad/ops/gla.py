"""Gated linear attention: a gate for each step and channel of the keys.

Source: Yang, Wang, Shen, Panda and Kim 2023.
"""

from __future__ import annotations

from typing import Any

from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        g: log decays, `[B, T, H, K]`. `None`: no decay.
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
        gk=g,
        scale=scale,
        initial_state=initial_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
        names={"gk": "g"},
    )


def fused_recurrent_gla(
    q: Any,
    k: Any,
    v: Any,
    gk: Any | None = None,
    gv: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_gla` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        gk: `[B, T, H, K]`, the `g` of `chunk_gla`.
        gv: must be `None`.
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
    refuse(gv=gv)
    return recurrent(
        q,
        k,
        v,
        gk=gk,
        scale=scale,
        initial_state=initial_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
        unknown=kwargs,
    )
