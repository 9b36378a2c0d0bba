"""Selective state spaces: Mamba's scan, Mamba-2's, and one step of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .gates import silu, softplus
from .layout import repeat_heads, starts_of
from .recurrence import States, first_state, outer, recur

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def step_sizes(dt: Array, dt_bias: Array | None, *, dt_softplus: bool) -> Float64:
    """Returns `dt` plus its bias, after softplus if there is one."""
    dt = dt.astype(np.float64)
    if dt_bias is not None:
        dt = dt + dt_bias.astype(np.float64)
    return softplus(dt) if dt_softplus else dt


def mamba_chunk_scan_combined(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    chunk_size: int | None = None,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    initial_states: Array | None = None,
    seq_idx: Array | None = None,
    cu_seqlens: Any | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, np.inf),
) -> tuple[Float64, Float64]:
    """Mamba-2's state space duality in float64, `S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T`, `y_t = S_t C_t + D x_t`.

    The output is `y * silu(z)`.

    Transformers are SSMs, Dao and Gu 2024.

    Args:
        x: `[B, T, H, P]`.
        dt: `[B, T, H]`.
        A: below 0, `[H]`.
        B: `[B, T, G, N]`, `G` a divisor of `H`: each group serves `H / G` consecutive heads.
        C: `[B, T, G, N]`.
        chunk_size: has no influence.
        D: `[H]` or `[H, P]`; `None` is 0.
        z: gate, `[B, T, H, P]`, or `None`.
        dt_bias: added to `dt`, `[H]`; `None` is 0.
        initial_states: `S` before the first token, `[B, H, P, N]`, with `cu_seqlens` one for each sequence. Default: 0.
        seq_idx: the number of the sequence of each token, `[B, T]`: the state is 0 again where it changes. Before the first token
            it is 0, so that `initial_states` belong to sequence 0.
        cu_seqlens: where each of the packed sequences begins, and where the last one ends; `B` is 1. They are apart with or without
            `seq_idx`, and begin with their `initial_states` whatever that says.
        dt_softplus: whether softplus is taken of `dt` and its bias.
        dt_limit: what it is clipped to after that.

    Returns:
        The output, `[B, T, H, P]`, and `S` after the last token, with `cu_seqlens` of each sequence.
    """
    batch, length, heads, width = x.shape
    x, a = x.astype(np.float64), A.astype(np.float64)
    b, c = (repeat_heads(y.astype(np.float64), heads) for y in (B, C))
    dt = np.clip(step_sizes(dt, dt_bias, dt_softplus=dt_softplus), *dt_limit)

    def step(states: States, x: Array, dt: Array, b: Array, c: Array, starts: Array) -> tuple[States, Array]:
        state = np.where(starts[:, None, None, None], 0.0, states[0])
        state = np.exp(dt * a)[..., None, None] * state + outer(dt[..., None] * x, b)
        return (state,), np.einsum("bhpn,bhn->bhp", state, c)

    state = first_state(initial_states, (heads, width, b.shape[-1]), batch, cu_seqlens)
    starts = starts_of(seq_idx, (batch, length))
    if cu_seqlens is not None:
        begins = np.asarray(cu_seqlens)
        starts[:, begins[begins < length]] = False
    tokens = (x, dt, b, c, starts)
    y, (state,) = recur(step, tokens, (state,), (heads, width), cu_seqlens=cu_seqlens)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D).astype(np.float64) * x
    return y if z is None else y * silu(z), state


def selective_scan_fn(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """Mamba's selective scan in float64, in each channel.

    `h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t`, `y_t = C_t^T h_t + D u_t`. The output is `y * silu(z)`.

    Mamba, Gu and Dao 2023.

    Args:
        u: `[B, D, T]`.
        delta: `[B, D, T]`.
        A: real, below 0, `[D, N]`.
        B: `[B, N, T]`, `[B, G, N, T]` with `G` a divisor of `D`, or the same for all tokens, `[D, N]`.
        C: as `B`.
        D: `[D]`; `None` is 0.
        z: gate, `[B, D, T]`, or `None`.
        delta_bias: added to `delta`, `[D]`; `None` is 0.
        delta_softplus: whether softplus is taken of `delta` and its bias.
        initial_state: `h` before the first token, `[S, D, N]` for `S` sequences. Default: 0. mamba_ssm's function has none.
        cu_seqlens: where each of `S` packed sequences begins, and where the last one ends, `[S + 1]`; `B` is 1. Default: each row
            is a sequence, `S = B`. mamba_ssm's function has none.

    Returns:
        The output, `[B, D, T]`, and `h` after the last token.
    """
    a = A.astype(np.float64)
    u, delta = (np.swapaxes(x.astype(np.float64), 1, 2) for x in (u, delta))
    batch, _, channels = u.shape
    dt = step_sizes(delta, delta_bias, dt_softplus=delta_softplus)

    def step(states: States, u: Array, dt: Array, b: Array, c: Array) -> tuple[States, Array]:
        h = np.exp(dt[..., None] * a) * states[0] + (dt * u)[..., None] * b
        return (h,), (h * c).sum(axis=-1)

    h = first_state(initial_state, a.shape, batch, cu_seqlens)
    tokens = (u, dt, *(_of_tokens(x.astype(np.float64), u.shape) for x in (B, C)))
    y, (h,) = recur(step, tokens, (h,), (channels,), cu_seqlens=cu_seqlens)
    if D is not None:
        y = y + D.astype(np.float64) * u
    y = np.swapaxes(y, 1, 2)
    return y if z is None else y * silu(z), h


def _of_tokens(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns `B` or `C` of `selective_scan_fn` as `[B, T, D or 1, N]`, where `u` has the shape `[B, T, D]`."""
    if x.ndim == 2:
        return np.broadcast_to(x, (*shape[:2], *x.shape))
    if x.ndim == 3:
        return np.moveaxis(x, 2, 1)[:, :, None]
    return repeat_heads(np.moveaxis(x, 3, 1), shape[2])


def selective_state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    *,
    dt_softplus: bool = False,
    state_batch_indices: Array | None = None,
) -> tuple[Float64, Float64]:
    """One step of Mamba's and Mamba-2's state space in float64; see `selective_scan_fn`.

    Unlike mamba_ssm's it returns the next state rather than writing it.

    Args:
        state: `[S, D, N]`, or with heads `[S, H, D, N]`.
        x: `[B, D]` or `[B, H, D]`.
        dt: as `x`.
        A: `[D, N]` or `[H, D, N]`.
        B: `[B, N]`, or with groups `[B, G, N]`, `G` a divisor of `H`.
        C: as `B`.
        D: `[D]` or `[H, D]`; `None` is 0.
        z: gate, as `x`, or `None`.
        dt_bias: `[D]` or `[H, D]`; `None` is 0.
        dt_softplus: whether softplus is taken of `dt` and its bias.
        state_batch_indices: which state each row of `x` belongs to, `[B]`; rows with a negative one have the output 0 and no state.
            Default: `S = B`, each its own.

    Returns:
        The output, as `x`, and the states after the step, as `state`.
    """
    a, states = _of_rank(A, 3, 0), _of_rank(state, 4, 1)
    rows = np.arange(len(x)) if state_batch_indices is None else np.asarray(state_batch_indices)
    live = rows >= 0
    bias = None if dt_bias is None else _of_rank(dt_bias, 2, 0)
    steps = step_sizes(_of_rank(dt, 3, 1), bias, dt_softplus=dt_softplus)[live, ..., None]
    values, b, c = (_of_rank(y, 3, 1)[live] for y in (x, B, C))
    b, c = (np.repeat(y, states.shape[1] // y.shape[1], axis=1)[:, :, None] for y in (b, c))
    new = np.exp(steps * a) * states[rows[live]] + steps * b * values[..., None]
    y = (new * c).sum(axis=-1)
    if D is not None:
        y = y + _of_rank(D, 2, 0) * values
    if z is not None:
        y = y * silu(_of_rank(z, 3, 1)[live])
    states[rows[live]] = new
    out = np.zeros(x.shape)
    out[live] = y.reshape(-1, *x.shape[1:])
    return out, states.reshape(state.shape)


def _of_rank(x: Array, rank: int, axis: int) -> Float64:
    """Returns a copy of `x` in float64, with an axis of length 1 if that makes it an array of `rank` axes."""
    x = x.astype(np.float64)
    return np.expand_dims(x, axis) if x.ndim == rank - 1 else x
