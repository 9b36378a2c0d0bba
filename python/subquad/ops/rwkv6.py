"""RWKV-6: a gate for each channel of the keys, which acts after the output, and a bonus for the current token.

Source: Eagle and Finch, Peng et al. 2024.
"""

from __future__ import annotations

from typing import Any

from .recurrent import recurrent, require

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_rwkv6(
    r: Any,
    k: Any,
    v: Any,
    w: Any,
    u: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T r_t`, `S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T`.

    See `subquad.ops.recurrent`.

    Args:
        r: receptances, the queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        w: log decays, `[B, T, H, K]`.
        u: bonus of the current token, `[H, K]`, float32, float64 or of r's dtype.
        scale: factor of the outputs.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state or `None`.
    """
    del cu_seqlens_cpu
    return _rwkv6(
        r,
        k,
        v,
        w,
        u,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
    )


def fused_recurrent_rwkv6(
    r: Any,
    k: Any,
    v: Any,
    w: Any,
    u: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_rwkv6` does.

    Args:
        r: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        w: `[B, T, H, K]`.
        u: `[H, K]`.
        scale: see there.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        reverse: whether sequences are read from the last token to the first.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        See there.
    """
    return _rwkv6(
        r,
        k,
        v,
        w,
        u,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
        unknown=kwargs,
    )


def _rwkv6(r: Any, k: Any, v: Any, w: Any, u: Any, **options: Any) -> tuple[Any, Any | None]:
    require(w=w, u=u)
    return recurrent(r, k, v, gk=w, u=u, names={"q": "r", "gk": "w"}, **options)
