"""Lightning attention: linear attention with a constant decay for each head, slower in deeper layers.

Sources: TransNormerLLM, Qin et al. 2023; Lightning Attention-2, Qin et al. 2024.
"""

from __future__ import annotations

from typing import Any

from .namespace import head_constants
from .recurrent import recurrent

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_lightning_attn(
    q: Any,
    k: Any,
    v: Any,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = exp(g) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    `g` is `-8 h / H * (1 - layer_idx / num_layers)` in head `h`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        layer_idx: of the layer, from 0.
        num_layers: of the model.
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
        g_gamma=_decays(q, v, layer_idx, num_layers),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
    )


def fused_recurrent_lightning_attn(
    q: Any,
    k: Any,
    v: Any,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_lightning_attn` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        layer_idx: see there.
        num_layers: see there.
        scale: see there.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        reverse: whether sequences are read from the last token to the first.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        See there.
    """
    return recurrent(
        q,
        k,
        v,
        g_gamma=_decays(q, v, layer_idx, num_layers),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
        unknown=kwargs,
    )


def _decays(q: Any, v: Any, layer_idx: int, num_layers: int) -> Any:
    """Returns the log decay of each head, `[H]`."""
    if not 0 <= layer_idx <= num_layers or num_layers < 1:
        raise ValueError(f"layer_idx: expected 0 to num_layers, {num_layers}, got {layer_idx}")
    heads = q.shape[2] if getattr(q, "ndim", 0) == 4 else 1
    rate = 8.0 / max(heads, 1) * (1.0 - layer_idx / num_layers)
    return head_constants(q, v, lambda head: -rate * head)
