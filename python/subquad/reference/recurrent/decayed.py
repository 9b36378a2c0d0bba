"""States that decay and to which an outer product is added: linear attention, retention, GLA, RWKV-6, GateLoop, HGRN."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import log_decays, queries_and_keys
from .recurrence import States, first_state, outer, read, recur, recur_matrix

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def _step(states: States, q: Array, k: Array, v: Array, *decays: Array) -> tuple[States, Array]:
    """`S = exp(g) S + k v^T`, `o = q^T S`, for any number of logarithms `g` of decays."""
    (state,) = states
    for g in decays:
        state = np.exp(g) * state
    state = state + outer(k, v)
    return (state,), read(q, state)


def _decayed(
    q: Array,
    k: Array,
    v: Array,
    decays: tuple[Array, ...],
    scale: float | None,
    initial_state: Array | None,
    **options: Any,
) -> tuple[Float64, Float64]:
    heads = q.shape[2]
    q, k = queries_and_keys(q, k, scale, heads)
    tokens = (q, k, v.astype(np.float64), *decays)
    return recur_matrix(_step, tokens, initial_state, (heads, q.shape[-1], v.shape[-1]), **options)


def linear_attn(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    initial_state: Array | tuple[Array, Array] | None = None,
    *,
    normalize: bool,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64 | tuple[Float64, Float64]]:
    """Causal linear attention in float64, `S_t = S_(t-1) + k_t v_t^T`, `o_t = q_t^T S_t`, with `q` scaled.

    With `normalize`, `z_t = z_(t-1) + k_t`, and `o_t` is divided by `q_t^T z_t + 1e-10`.

    Transformers are RNNs, Katharopoulos et al. 2020; the offset is flash-linear-attention's.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `S` before the first token, `[N, H, K, V]`; with `normalize` also `(S, z)`, where `z` is `[N, 1, H, K]`. The
            default is 0.
        normalize: has no default, as flash-linear-attention's chunked and recurrent forms have different ones.
        reverse: whether sequences are read from the last token to the first.
        cu_seqlens: where each of `N` packed sequences begins, and where the last one ends, `[N + 1]`; `B` is 1. Default: each row
            is a sequence, `N = B`.

    Returns:
        `o`, `[B, T, H, V]`, and `S` after the last token, with `normalize` `(S, z)`.
    """
    initial, initial_z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    options = {"reverse": reverse, "cu_seqlens": cu_seqlens}
    o, final = _decayed(q, k, v, (), scale, initial, **options)
    if not normalize:
        return o, final
    batch, _, heads, width = q.shape
    q, k = queries_and_keys(q, k, scale, heads)

    def step(states: States, q: Array, k: Array) -> tuple[States, Array]:
        z = states[0] + k
        return (z,), (q * z).sum(axis=-1, keepdims=True)

    z = first_state(None if initial_z is None else initial_z[:, 0], (heads, width), batch, cu_seqlens)
    weights, (z,) = recur(step, (q, k), (z,), (heads, 1), reverse=reverse, cu_seqlens=cu_seqlens)
    return o / (weights + 1e-10), (final, z[:, None])


def simple_gla(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    g_gamma: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """Gated linear attention with one decay per head in float64, `S_t = exp(g_t) S_(t-1) + k_t v_t^T`, `o_t = q_t^T S_t`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decay of each token, `[B, T, H]`. Default: 0.
        g_gamma: log decay of all tokens, `[H]`; it is added to `g`. Default: 0.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `S` before the first token, `[N, H, K, V]`. Default: 0.
        reverse: see `linear_attn`.
        state_v_first: whether states are given and returned as `[N, H, V, K]`.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, H, V]`, and `S` after the last token.
    """
    per_head = None if g_gamma is None else np.broadcast_to(g_gamma, q.shape[:3])
    return _decayed(
        q,
        k,
        v,
        (*log_decays(g), *log_decays(per_head)),
        scale,
        initial_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def retention(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """Retention in float64: `simple_gla` with the decay `1 - 2 ** (-5 - h)` in head `h`.

    Retentive Network, Sun et al. 2023.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: see `simple_gla`, also for the arguments that follow.
        initial_state: see there.
        reverse: see there.
        state_v_first: see there.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    g_gamma = np.log1p(-(2.0 ** (-5.0 - np.arange(q.shape[2]))))
    options: dict[str, Any] = {
        "reverse": reverse,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    return simple_gla(q, k, v, None, g_gamma, scale, initial_state, **options)


def lightning_attn(
    q: Array,
    k: Array,
    v: Array,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """Lightning attention in float64: `simple_gla` with the log decay `-8 h / H * (1 - layer_idx / num_layers)` in head `h`.

    TransNormerLLM, Qin et al. 2023; Lightning Attention-2, Qin et al. 2024.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        layer_idx: from 0.
        num_layers: of the model.
        scale: see `simple_gla`, also for the arguments that follow.
        initial_state: see there.
        reverse: see there.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    heads = q.shape[2]
    g_gamma = -8.0 / heads * (1.0 - layer_idx / num_layers) * np.arange(heads)
    return simple_gla(q, k, v, None, g_gamma, scale, initial_state, reverse=reverse, cu_seqlens=cu_seqlens)


def gla(
    q: Array,
    k: Array,
    v: Array,
    gk: Array | None = None,
    gv: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """Gated linear attention in float64, `S_t = diag(exp(gk_t)) S_(t-1) diag(exp(gv_t)) + k_t v_t^T`, `o_t = q_t^T S_t`.

    Gated Linear Attention Transformers, Yang et al. 2023.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        gk: log decay of the rows of the state, `[B, T, H, K]`. Default: 0.
        gv: log decay of its columns, `[B, T, H, V]`. Default: 0.
        scale: see `simple_gla`, also for the arguments that follow.
        initial_state: see there.
        reverse: see there.
        state_v_first: see there.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    options: dict[str, Any] = {
        "reverse": reverse,
        "state_v_first": state_v_first,
        "cu_seqlens": cu_seqlens,
    }
    return _decayed(q, k, v, log_decays(None, gk, gv), scale, initial_state, **options)


def rwkv6(
    r: Array,
    k: Array,
    v: Array,
    w: Array,
    u: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """RWKV-6 in float64: `o_t = r_t^T (S_(t-1) + diag(u) k_t v_t^T)`, `S_t = diag(exp(w_t)) S_(t-1) + k_t v_t^T`.

    Eagle and Finch, Peng et al. 2024. The decay of a token comes after its output.

    Args:
        r: receptances, in the place of queries, `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        w: log decay, `[B, T, H, K]`.
        u: bonus of the current token, `[H, K]`.
        scale: factor of `r`. Default: `K ** -0.5`.
        initial_state: see `simple_gla`, also for the arguments that follow.
        reverse: see there.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    heads, width = r.shape[2:]
    r, k = queries_and_keys(r, k, scale, heads)
    bonus = u.astype(np.float64)

    def step(states: States, r: Array, k: Array, v: Array, w: Array) -> tuple[States, Array]:
        (state,) = states
        o = read(r, state + outer(bonus * k, v))
        return (np.exp(w) * state + outer(k, v),), o

    tokens = (r, k, v.astype(np.float64), *log_decays(None, w))
    shape = (heads, width, v.shape[-1])
    return recur_matrix(step, tokens, initial_state, shape, reverse=reverse, cu_seqlens=cu_seqlens)


def lightnet(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    initial_state: tuple[Array | None, Array | None] | None = None,
    *,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, tuple[Float64, Float64]]:
    """LightNet's attention in float64: channel `c` of the state is the average of the values so far with the weights `exp(k[c])`.

    `z_t = log(exp(z_(t-1)) + exp(k_t))`, `S_t = diag(exp(z_(t-1) - z_t)) S_(t-1) + exp(k_t - z_t) v_t^T`, `o_t = q_t^T S_t`.

    You Only Scan Once, Qin et al. 2024.

    Args:
        q: `[B, T, H, K]`.
        k: logarithms of weights, `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `(S, z)` before the first token, `[N, H, K, V]` and `[N, 1, H, K]`. Defaults: 0, and `-inf`, for which the
            first decay is 1.
        state_v_first: whether `S` is given and returned as `[N, H, V, K]`.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, H, V]`, and `(S, z)` after the last token.
    """
    batch, _, heads, width = q.shape
    q, k = queries_and_keys(q, k, scale, heads)

    def step(states: States, q: Array, k: Array, v: Array) -> tuple[States, Array]:
        state, z = states
        z_new = np.logaddexp(z, k)
        decay = np.where(np.isneginf(z), 1.0, np.exp(z - z_new))
        state = decay[..., None] * state + outer(np.exp(k - z_new), v)
        return (state, z_new), read(q, state)

    initial, initial_z = (None, None) if initial_state is None else initial_state
    if initial is not None and state_v_first:
        initial = np.swapaxes(initial, -1, -2)
    state = first_state(initial, (heads, width, v.shape[-1]), batch, cu_seqlens)
    nothing = np.full((len(state), 1, heads, width), -np.inf)
    z = first_state((nothing if initial_z is None else initial_z)[:, 0], (heads, width), batch, cu_seqlens)
    tokens = (q, k, v.astype(np.float64))
    o, (state, z) = recur(step, tokens, (state, z), (heads, v.shape[-1]), cu_seqlens=cu_seqlens)
    return o, (np.swapaxes(state, -1, -2) if state_v_first else state, z[:, None])


def gateloop(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    scale: float = 1.0,
    initial_state: Array | None = None,
    *,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, npt.NDArray[np.complex128]]:
    """GateLoop in float64: `S_t = diag(a_t) S_(t-1) + k_t v_t^T` with complex `a_t`, `o_t = q_t^T Re(S_t)`.

    GateLoop, Katsch 2023.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: the decay itself, no logarithm, complex, `[B, T, H, K]`.
        scale: factor of the queries. The paper has none.
        initial_state: `S` before the first token, complex, `[N, H, K, V]`. Default: 0.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, H, V]`, and `S` after the last token, complex.
    """
    batch, _, heads, width = q.shape
    q, k = queries_and_keys(q, k, scale, heads)

    def step(states: States, q: Array, k: Array, v: Array, a: Array) -> tuple[States, Array]:
        state = a[..., None] * states[0] + outer(k, v)
        return (state,), read(q, state.real)

    state = first_state(initial_state, (heads, width, v.shape[-1]), batch, cu_seqlens, np.complex128)
    tokens = (q, k, v.astype(np.float64), a.astype(np.complex128))
    o, (state,) = recur(step, tokens, (state,), (heads, v.shape[-1]), cu_seqlens=cu_seqlens)
    return o, state


def hgrn(
    x: Array, g: Array, initial_state: Array | None = None, *, cu_seqlens: Any | None = None
) -> tuple[Float64, Float64]:
    """HGRN's recurrence in float64, `o_t = h_t = exp(g_t) h_(t-1) + x_t`.

    Hierarchically Gated Recurrent Neural Network, Qin et al. 2023.

    Args:
        x: `[B, T, D]`.
        g: log decay, `[B, T, D]`.
        initial_state: `h` before the first token, `[N, D]`. Default: 0.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, D]`, and `h` after the last token.
    """

    def step(states: States, x: Array, g: Array) -> tuple[States, Array]:
        h = np.exp(g) * states[0] + x
        return (h,), h

    h = first_state(initial_state, x.shape[2:], x.shape[0], cu_seqlens)
    tokens = (x.astype(np.float64), g.astype(np.float64))
    o, (h,) = recur(step, tokens, (h,), x.shape[2:], cu_seqlens=cu_seqlens)
    return o, h
