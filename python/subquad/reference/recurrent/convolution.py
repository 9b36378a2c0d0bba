"""Short causal convolutions of each channel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .gates import silu
from .layout import starts_of
from .recurrence import States, first_state, recur

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Activation = Literal["silu", "swish"]


def causal_conv1d_fn(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    seq_idx: Array | None = None,
    initial_states: Array | None = None,
    *,
    activation: Activation | None = None,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """The causal convolution of each channel in float64, `y_t = bias + sum_j weight_j x_(t - W + 1 + j)`.

    Args:
        x: `[B, D, T]`.
        weight: `[D, W]`; the last one belongs to the current token.
        bias: `[D]`; `None` is 0.
        seq_idx: the number of the sequence of each token, `[B, T]`: tokens of other sequences count as 0. Tokens with a negative
            number have the output 0.
        initial_states: what was before the first token, `[N, D, W - 1]`. Default: 0.
        activation: "silu" and "swish" are the same, `y * sigmoid(y)`; `None` for none.
        cu_seqlens: where each of `N` packed sequences begins, and where the last one ends, `[N + 1]`; `B` is 1. Default: each row
            is a sequence, `N = B`.

    Returns:
        `y`, `[B, D, T]`, and the last `W - 1` tokens of each sequence with what was before them, `[N, D, W - 1]`.
    """
    batch, channels, length = x.shape
    weight = weight.astype(np.float64)
    shift = 0.0 if bias is None else bias.astype(np.float64)

    def step(states: States, x: Array, starts: Array) -> tuple[States, Array]:
        past = np.where(starts[:, None, None], 0.0, states[0])
        window = np.concatenate([past, x[..., None]], axis=-1)
        return (window[..., 1:],), (window * weight).sum(axis=-1) + shift

    past = first_state(initial_states, (channels, weight.shape[1] - 1), batch, cu_seqlens)
    tokens = (np.swapaxes(x.astype(np.float64), 1, 2), starts_of(seq_idx, (batch, length)))
    y, (past,) = recur(step, tokens, (past,), (channels,), cu_seqlens=cu_seqlens)
    y = np.swapaxes(_activate(y, activation), 1, 2)
    if seq_idx is not None:
        y = np.where(np.asarray(seq_idx)[:, None] < 0, 0.0, y)
    return y, past


def causal_conv1d_update(
    x: Array,
    conv_state: Array,
    weight: Array,
    bias: Array | None = None,
    activation: Activation | None = None,
    cache_seqlens: Array | None = None,
    conv_state_indices: Array | None = None,
) -> tuple[Float64, Float64]:
    """Some more tokens of the causal convolution in float64.

    Unlike causal_conv1d's it returns the next states rather than writing them.

    Args:
        x: `[B, D]` or `[B, D, T]`.
        conv_state: the tokens before, `[S, D, L]`, `L >= W - 1`, the last one last.
        weight: `[D, W]`.
        bias: `[D]`; `None` is 0.
        activation: see `causal_conv1d_fn`.
        cache_seqlens: how many tokens each sequence has seen, `[B]`: states are circular, and token `t` lies at `t % L`. Default:
            they are shifted.
        conv_state_indices: which state each row of `x` belongs to, `[B]`; rows with a negative one have the output 0 and no state.
            Default: `S = B`, each its own.

    Returns:
        The output, as `x`, and the states after it, as `conv_state`.
    """
    tokens = (x[..., None] if x.ndim == 2 else x).astype(np.float64)
    state, weight = conv_state.astype(np.float64), weight.astype(np.float64)
    shift = 0.0 if bias is None else bias.astype(np.float64)
    batch, _, length = tokens.shape
    taps, size = weight.shape[1], state.shape[-1]
    y = np.zeros(tokens.shape)
    rows = range(batch) if conv_state_indices is None else np.asarray(conv_state_indices).tolist()
    for b, row in enumerate(rows):
        if row < 0:
            continue
        if cache_seqlens is None:
            line = np.concatenate([state[row], tokens[b]], axis=-1)
            state[row] = line[:, length:]
        else:
            places = (int(cache_seqlens[b]) + np.arange(1 - taps, length)) % size
            line = np.concatenate([state[row][:, places[: taps - 1]], tokens[b]], axis=-1)
            for t in range(length):
                state[row][:, places[taps - 1 + t]] = tokens[b, :, t]
        for t in range(length):
            end = line.shape[-1] - length + t + 1
            y[b, :, t] = (line[:, end - taps : end] * weight).sum(axis=-1) + shift
    return _activate(y, activation).reshape(x.shape), state


def _activate(y: Float64, activation: Activation | None) -> Float64:
    return y if activation is None else silu(y)
