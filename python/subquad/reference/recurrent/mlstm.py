"""xLSTM's matrix memory, with exponential and with sigmoid input gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .gates import sigmoid, softplus
from .layout import queries_and_keys
from .recurrence import States, first_state, outer, read, recur

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def mlstm(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    scale: float | None = None,
    initial_state: tuple[Array, Array, Array] | None = None,
    *,
    eps: float = 1e-6,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, tuple[Float64, Float64, Float64]]:
    """The mLSTM with exponential input gates in float64.

    `C_t = sigmoid(f_t) C_(t-1) + exp(i_t) k_t v_t^T`, `n_t = sigmoid(f_t) n_(t-1) + exp(i_t) k_t`,
    `o_t = q_t^T C_t / max(|q_t^T n_t|, 1)`.

    `C` and `n` are kept as multiples of `exp(m)`, `m_t = max(log(sigmoid(f_t)) + m_(t-1), i_t)`, so that the 1 of the denominator
    becomes `exp(-m_t)`; `eps` is added to the denominator after that.

    xLSTM, Beck et al. 2024; the place of the scale is that of Tiled Flash Linear Attention, Beck et al. 2025.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        i: input gates before their activation, `[B, T, H]`.
        f: forget gates before their activation, `[B, T, H]`.
        scale: factor of the queries, in numerator and denominator. Default: `K ** -0.5`.
        initial_state: `(C exp(-m), n exp(-m), m)` before the first token, `[N, H, K, V]`, `[N, H, K]` and `[N, H]`. Default: 0.
        eps: added to denominators. The papers have none.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, H, V]`, and `(C exp(-m), n exp(-m), m)` after the last token.
    """
    batch, _, heads, width = q.shape
    q, k = queries_and_keys(q, k, scale, heads)

    def step(
        states: States, q: Array, k: Array, v: Array, log_i: Array, log_f: Array
    ) -> tuple[States, Array]:
        c, n, m = states
        m_new = np.maximum(log_f + m, log_i)
        forget, write = np.exp(log_f + m - m_new), np.exp(log_i - m_new)
        c = forget[..., None, None] * c + write[..., None, None] * outer(k, v)
        n = forget[..., None] * n + write[..., None] * k
        norm = np.maximum(np.abs((q * n).sum(axis=-1)), np.exp(-m_new)) + eps
        return (c, n, m_new), read(q, c) / norm[..., None]

    shapes: tuple[tuple[int, ...], ...] = ((heads, width, v.shape[-1]), (heads, width), (heads,))
    given = (None, None, None) if initial_state is None else initial_state
    states = tuple(first_state(x, shape, batch, cu_seqlens) for x, shape in zip(given, shapes, strict=True))
    tokens = (q, k, v.astype(np.float64), i.astype(np.float64), -softplus(-f))
    o, (c, n, m) = recur(step, tokens, states, (heads, v.shape[-1]), cu_seqlens=cu_seqlens)
    return o, (c, n, m)


def mlstm_sigmoid(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    scale: float | None = None,
    initial_state: Array | tuple[Array, Array] | None = None,
    *,
    normalize: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64 | tuple[Float64, Float64]]:
    """The mLSTM with sigmoid input gates in float64, `C_t = sigmoid(f_t) C_(t-1) + sigmoid(i_t) k_t v_t^T`, `o_t = q_t^T C_t`.

    With `normalize`, `n_t = sigmoid(f_t) n_(t-1) + sigmoid(i_t) k_t`, and `o_t` is divided by `max(|q_t^T n_t|, 1)`.

    Tiled Flash Linear Attention, Beck et al. 2025.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        i: input gates before their activation, `[B, T, H]`.
        f: forget gates before their activation, `[B, T, H]`.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `C` before the first token, `[N, H, K, V]`, with `normalize` `(C, n)` with `n` `[N, H, K]`. Default: 0.
        normalize: whether there is a denominator. The paper has none.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, H, V]`, and `C` after the last token, with `normalize` `(C, n)`.
    """
    batch, _, heads, width = q.shape
    q, k = queries_and_keys(q, k, scale, heads)

    def step(
        states: States, q: Array, k: Array, v: Array, write: Array, forget: Array
    ) -> tuple[States, Array]:
        c, n = states
        c = forget[..., None, None] * c + write[..., None, None] * outer(k, v)
        n = forget[..., None] * n + write[..., None] * k
        norm = np.maximum(np.abs((q * n).sum(axis=-1)), 1.0) if normalize else np.ones(n.shape[:-1])
        return (c, n), read(q, c) / norm[..., None]

    given = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    c = first_state(given[0], (heads, width, v.shape[-1]), batch, cu_seqlens)
    n = first_state(given[1], (heads, width), batch, cu_seqlens)
    tokens = (q, k, v.astype(np.float64), sigmoid(i), sigmoid(f))
    o, (c, n) = recur(step, tokens, (c, n), (heads, v.shape[-1]), cu_seqlens=cu_seqlens)
    return o, (c, n) if normalize else c
