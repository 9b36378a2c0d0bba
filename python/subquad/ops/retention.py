"""Retention: linear attention with a constant decay for each head.

Source: Retentive Network, Sun et al. 2023.
"""

from __future__ import annotations

from math import log1p
from typing import Any

from .namespace import head_constants
from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_retention(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = (1 - 2 ** (-5 - h)) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t` in head `h`; see `subquad.ops.recurrent`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        scale: factor of the outputs.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state or `None`.
    """
    return recurrent(
        q,
        k,
        v,
        g_gamma=_decays(q, v),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
    )


def fused_chunk_retention(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_retention` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        See there.
    """
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, **kwargs)


def fused_recurrent_retention(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_retention` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
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
        g_gamma=_decays(q, v),
        scale=scale,
        initial_state=initial_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
        unknown=kwargs,
    )


def parallel_retention(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Computes the outputs of `chunk_retention`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: see there.
        output_attentions: must be False.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        The outputs, `[B, T, H, V]`, and `None`.
    """
    refuse(output_attentions=output_attentions)
    return chunk_retention(q, k, v, scale, None, False, cu_seqlens, **kwargs)[0], None  # noqa: FBT003


def _decays(q: Any, v: Any) -> Any:
    """Returns the log decay of each head, `[H]`."""
    return head_constants(q, v, lambda head: log1p(-(2.0 ** (-5.0 - head))))
