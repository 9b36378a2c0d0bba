"""RWKV-7: a delta rule with a gate for each channel of the keys, in which reading and writing have keys of their own.

Source: RWKV-7 Goose, Peng et al. 2025.
"""

from __future__ import annotations

from typing import Any

from .gates import check_lower_bound
from .recurrent import recurrent, refuse, require

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_rwkv7(
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    scale: float | None = 1.0,
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
    """Computes `S_t = (diag(exp(w_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T r_t`; see `subquad.ops.recurrent`.

    It is `chunk_dplr_delta_rule` with other names, another order and no scale.

    Args:
        r: receptances, the queries, `[B, T, H, K]`.
        w: log decays, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        a: what the state is read with before it decays, `[B, T, H, K]`, of r's dtype.
        b: where what was read is written to, `[B, T, H, K]`, of r's dtype.
        scale: factor of the outputs; `None` is `K ** -0.5`.
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
    require(w=w, a=a, b=b)
    return recurrent(
        r,
        k,
        v,
        a=a,
        b=b,
        gk=w,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
        unknown=kwargs,
        names={"q": "r", "gk": "w"},
    )


def fused_recurrent_rwkv7(
    r: Any,
    w: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = True,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_rwkv7` does; mind the other defaults.

    Args:
        r: `[B, T, H, K]`.
        w: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: `[B, T, H, K]`.
        b: `[B, T, H, K]`.
        scale: factor of the outputs, `K ** -0.5` by default.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state; true by default.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        See there.
    """
    return chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens, **kwargs)
