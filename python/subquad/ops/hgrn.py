"""HGRN's recurrence: a gate for each token and channel.

Source: Hierarchically Gated Recurrent Neural Network, Qin, Yang and Zhong 2023.
"""

from __future__ import annotations

from typing import Any

from .. import _native
from .pytorch import REFUSALS, calls, is_tensor, is_watched

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_hgrn(
    x: Any, g: Any, initial_state: Any | None = None, output_final_state: bool = False
) -> tuple[Any, Any | None]:
    """Computes `o_t = h_t = exp(g_t) h_(t-1) + x_t` in each channel.

    PyTorch differentiates it by all tensors, from the outputs: in half types, gradients of gates have the accuracy of those.
    `torch.compile` sees `subquad::linear_scan`; autocast casts `x`, but not gates and states.

    Args:
        x: inputs, `[B, T, D]`; float32, float64, float16 or bfloat16.
        g: natural logarithms of decays, `[B, T, D]`, of x's dtype, or float32 beside the half types.
        initial_state: `h` before the first token, `[B, D]`, of x's dtype or float32; zeros if it is `None`.
        output_final_state: whether to return `h` after the last token.

    Returns:
        The outputs, `[B, T, D]`, of x's library and dtype, and the final state, `[B, D]`, float32 (float64 for float64), or `None`.

    Raises:
        ValueError: for shapes that do not fit, arrays on other devices.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
        NotImplementedError: for second derivatives and forward mode.
    """
    return fused_recurrent_hgrn(x, g, initial_state, output_final_state)


def fused_recurrent_hgrn(
    x: Any,
    g: Any,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_hgrn` does, also for packed sequences.

    Args:
        x: `[B, T, D]`; `B` is 1 with `cu_seqlens`.
        g: see there.
        initial_state: `[N, D]`, with `N = B` unless there are `cu_seqlens`.
        output_final_state: see there.
        cu_seqlens: where packed sequences start, int32 or int64 `[N + 1]`.

    Returns:
        See there; the final state is `[N, D]`.

    Raises:
        ValueError: as there, and for sequences that do not start at 0, decrease, or do not end at `T`.
        TypeError: as there.
        NotImplementedError: as there.
    """
    if not is_watched():
        try:
            return _native.linear_scan(
                x, g, initial_state, cu_seqlens, log_gates=True, output_final_state=output_final_state
            )
        except REFUSALS:
            if not is_tensor(x):
                raise
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "log_gates": True}
    out, final_state = calls().linear_scan(x, g, options)
    return out, final_state if output_final_state else None
