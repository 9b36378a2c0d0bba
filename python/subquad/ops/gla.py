"""Gated linear attention: a gate for each step and channel of the keys.

Source: Yang, Wang, Shen, Panda and Kim 2023.
"""

from __future__ import annotations

from typing import Any

from .recurrent import recurrent


def chunk_gla(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,  # noqa: FBT001, FBT002 - flash-linear-attention's signature
    state_v_first: bool = False,  # noqa: FBT001, FBT002 - flash-linear-attention's signature
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        g: natural logarithms of the decays, 0 or below, `[B, T, H, K]`.
        scale: factor of the outputs. Default: `K ** -0.5`.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        state_v_first: whether states are `[N, H, V, K]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: `chunk_size`, a multiple of 16 up to 64, changes speed only.

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
    )
