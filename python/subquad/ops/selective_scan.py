"""Selective state spaces: Mamba's scan over a sequence, and one step of it and of Mamba-2's.

Sources: Mamba, Gu and Dao 2023; Transformers are SSMs, Dao and Gu 2024.

The functions have the names and arguments of mamba_ssm's. Arrays are PyTorch tensors, NumPy arrays or others that speak DLPack, of
one library: float32, float64, float16 or bfloat16. Parameters and states may be float32 beside the half types, and states and sums
are computed in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

from .. import _native
from .pytorch import REFUSALS, calls, is_tensor, is_watched

# The signatures are mamba_ssm's.
# ruff: noqa: FBT001, FBT002


def selective_scan_fn(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any | None = None,
    z: Any | None = None,
    delta_bias: Any | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Any | None = None,
) -> Any:
    """Computes `h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t`, `y_t = C_t^T h_t + D u_t` in each channel, times `z * sigmoid(z)`.

    PyTorch differentiates it by all tensors, with the states before every 64th step kept until then. `torch.compile` sees
    `subquad::selective_scan`; autocast casts `u`, `delta`, `B`, `C` and `z`.

    Args:
        u: inputs, `[B, D, L]`. `[B, L, D]` arrays that are transposed are read as they are.
        delta: sizes of steps, `[B, D, L]`, of u's dtype.
        A: rates, real, below 0 for states that fade, `[D, N]`.
        B: what inputs enter the states by, `[B, N, L]`, `[B, G, N, L]` for `G` groups of `D / G` consecutive channels, or the same
            for all steps, `[D, N]`.
        C: what states are read by, as `B`; with as many groups as `B` where both have them.
        D: what inputs enter the outputs by, `[D]`. `None` is 0.
        z: gate, `[B, D, L]`, of u's dtype.
        delta_bias: added to `delta`, `[D]`.
        delta_softplus: whether softplus is taken of `delta` and its bias.
        return_last_state: whether to return `h` after the last step.
        initial_state: `h` before the first step, `[B, D, N]`; zeros if it is `None`. mamba_ssm's function has none.

    Returns:
        The outputs, `[B, D, L]`, of u's library and dtype; with `return_last_state`, also `h` after the last step, `[B, D, N]`,
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that do not fit, arrays on other devices.
        TypeError: for dtypes that are not supported (complex ones among them) or differ, objects that are no arrays, mixed
            libraries.
        NotImplementedError: for second derivatives and forward mode.
        OverflowError: for sizes that cannot be indexed.
    """
    options = {
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
        "delta_softplus": bool(delta_softplus),
    }
    if not is_watched():
        try:
            out, last_state, _ = _native.selective_scan(
                u, delta, A, B, C, options, return_last_state=return_last_state, return_checkpoints=False
            )
        except REFUSALS:
            if not is_tensor(u):
                raise
        else:
            return (out, last_state) if return_last_state else out
    out, last_state = calls().selective_scan(u, delta, A, B, C, options)
    return (out, last_state) if return_last_state else out


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any | None = None,
    z: Any | None = None,
    dt_bias: Any | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Any | None = None,
) -> Any:
    """Updates states by one step, `h = exp(dt A) h + dt x B^T`, and returns `h C + D x`, times `z * sigmoid(z)`.

    Args:
        state: `[S, D, N]`, or with heads `[S, H, D, N]`, of x's dtype or float32; written in place.
        x: `[B, D]` or `[B, H, D]`.
        dt: sizes of steps, as `x`; any strides, so that one number for each head may be expanded.
        A: rates, `[D, N]` or `[H, D, N]`; where it is expanded along `N`, one exponential serves all states of a channel.
        B: what inputs enter the states by, `[B, N]`, or with heads `[B, G, N]` for `G` groups of `H / G` consecutive heads.
        C: what states are read by, as `B`.
        D: `[D]` or `[H, D]`. `None` is 0.
        z: gate, as `x`.
        dt_bias: added to `dt`, `[D]` or `[H, D]`.
        dt_softplus: whether softplus is taken of `dt` and its bias.
        state_batch_indices: which state each row of `x` belongs to, `[B]`, int32 or int64, each at most once; rows with a negative
            one have the output 0 and no state. Default: `S = B`, each its own.

    Returns:
        The outputs, as `x`.

    Raises:
        ValueError: for shapes that do not fit, states that cannot be written or share memory, indices that are out of range or
            given twice, arrays on other devices.
        TypeError: for dtypes that are not supported or differ, objects that are no arrays, mixed libraries.
        NotImplementedError: for tensors that require gradients.
    """
    options = {
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "dt_softplus": bool(dt_softplus),
        "state_batch_indices": state_batch_indices,
    }
    return _native.selective_state_update(state, x, dt, A, B, C, options)
