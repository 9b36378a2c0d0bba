"""States that are corrected rather than added to: delta rules, gated, with products of reflections, with low-rank transitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .gates import gdn_gate, kda_gate, strengths
from .layout import log_decays, queries_and_keys
from .recurrence import States, outer, read, recur_matrix

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def _correct(state: Array, k: Array, v: Array, beta: Array) -> Array:
    """`S + beta k (v - S^T k)^T`: what the state returns for `k` moves towards `v`."""
    return state + outer(k, beta * (v - read(k, state)))


def _step(states: States, q: Array, k: Array, v: Array, beta: Array, *decays: Array) -> tuple[States, Array]:
    """The state decays, by any number of logarithms of decays, and is corrected."""
    (state,) = states
    for g in decays:
        state = np.exp(g) * state
    state = _correct(state, k, v, beta)
    return (state,), read(q, state)


def _decayed_delta(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    decays: tuple[Array, ...],
    scale: float | None,
    initial_state: Array | None,
    *,
    use_qk_l2norm_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None,
) -> tuple[Float64, Float64]:
    heads = v.shape[2]
    q, k = queries_and_keys(q, k, scale, heads, use_qk_l2norm=use_qk_l2norm_in_kernel)
    beta = strengths(
        beta,
        v.shape[:3],
        use_sigmoid=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
    )
    return recur_matrix(
        _step,
        (q, k, v.astype(np.float64), beta, *decays),
        initial_state,
        (heads, q.shape[-1], v.shape[-1]),
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """The delta rule in float64, `S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T`, `o_t = q_t^T S_t`, with `q` scaled.

    Linear Transformers Are Secretly Fast Weight Programmers, Schlag et al. 2021; Parallelizing Linear Transformers with the Delta
    Rule, Yang et al. 2024.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`, or `[B, T, H, V]` for each column of the state. Default: 1.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `S` before the first token, `[N, H, K, V]`. Default: 0.
        use_qk_l2norm_in_kernel: whether queries and keys are divided by their lengths first: `x / sqrt(sum(x ** 2) + 1e-6)`.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, H, V]`, and `S` after the last token.
    """
    return _decayed_delta(
        q,
        k,
        v,
        beta,
        (),
        scale,
        initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    beta: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    gk: Array | None = None,
    gv: Array | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """The gated delta rule in float64: the state decays before it is corrected.

    `R_t = exp(g_t) S_(t-1)`, `S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T`, `o_t = q_t^T S_t`.

    Gated Delta Networks, Yang et al. 2024.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, `HV` a multiple of `H`: each head of `q` and `k` serves `HV / H` consecutive heads.
        g: log decay, `[B, T, HV]`. Default: 0.
        beta: `[B, T, HV]` or `[B, T, HV, V]`. Default: 1.
        scale: see `delta_rule`.
        initial_state: `S` before the first token, `[N, HV, K, V]`. Default: 0.
        gk: log decay of the rows of the state, `[B, T, HV, K]`; all decays multiply. Default: 0.
        gv: log decay of its columns, `[B, T, HV, V]`. Default: 0.
        use_qk_l2norm_in_kernel: see `delta_rule`.
        use_gate_in_kernel: whether `gdn_gate(g, A_log, dt_bias)` is in the place of `g`.
        A_log: `[HV]`.
        dt_bias: `[HV]`.
        use_beta_sigmoid_in_kernel: whether `sigmoid(beta)` is in the place of `beta`.
        allow_neg_eigval: whether that sigmoid is doubled.
        state_v_first: whether states are given and returned as `[N, HV, V, K]`.
        cu_seqlens: see `linear_attn`.

    Returns:
        `o`, `[B, T, HV, V]`, and `S` after the last token.

    Raises:
        ValueError: for a gate without `g` or `A_log`.
    """
    if use_gate_in_kernel:
        if g is None or A_log is None:
            raise ValueError("use_gate_in_kernel needs g and A_log")
        g = gdn_gate(g, A_log, dt_bias)
    return _decayed_delta(
        q,
        k,
        v,
        beta,
        log_decays(g, gk, gv),
        scale,
        initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """Kimi Delta Attention in float64: the gated delta rule with one decay for each row of the state.

    Kimi Linear, Kimi Team 2025.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, `HV` a multiple of `H`.
        g: log decay, `[B, T, HV, K]`.
        beta: `[B, T, HV]` or `[B, T, HV, V]`.
        scale: see `gated_delta_rule`.
        initial_state: see there.
        use_qk_l2norm_in_kernel: see there.
        use_gate_in_kernel: whether `kda_gate(g, A_log, dt_bias, lower_bound)` is in the place of `g`.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        lower_bound: of the log decay that comes from the gate, or `None`.
        use_beta_sigmoid_in_kernel: see `gated_delta_rule`, also for the arguments that follow.
        allow_neg_eigval: see there.
        state_v_first: see there.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    if use_gate_in_kernel:
        g = kda_gate(g, A_log, dt_bias, lower_bound)
    return _decayed_delta(
        q,
        k,
        v,
        beta,
        log_decays(None, g),
        scale,
        initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def gated_delta_product(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    num_householder: int,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """The gated delta product in float64: for each token the state decays once and is corrected `n` times.

    DeltaProduct, Siems et al. 2025.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T * n, H, K]`, the `n` keys of a token one after the other.
        v: `[B, T * n, H, V]`.
        g: log decay, `[B, T, H]`, or `None`.
        beta: `[B, T * n, H]`.
        num_householder: `n`.
        scale: see `delta_rule`, also for the arguments that follow.
        initial_state: see there.
        use_qk_l2norm_in_kernel: see there.
        cu_seqlens: see there; it counts tokens, not keys.

    Returns:
        See there.
    """
    batch, length, heads, width = q.shape
    q, k = queries_and_keys(q, k, scale, heads, use_qk_l2norm=use_qk_l2norm_in_kernel)
    v, beta = v.astype(np.float64), beta.astype(np.float64)[..., None]
    k, v, beta = (x.reshape(batch, length, num_householder, *x.shape[2:]) for x in (k, v, beta))

    def step(
        states: States, q: Array, k: Array, v: Array, beta: Array, *decays: Array
    ) -> tuple[States, Array]:
        (state,) = states
        for decay in decays:
            state = np.exp(decay) * state
        for j in range(num_householder):
            state = _correct(state, k[:, j], v[:, j], beta[:, j])
        return (state,), read(q, state)

    tokens = (q, k, v, beta, *log_decays(g))
    return recur_matrix(step, tokens, initial_state, (heads, width, v.shape[-1]), cu_seqlens=cu_seqlens)


def dplr_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    gk: Array | None,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """The delta rule with diagonal plus low-rank transitions in float64, `S_t = (diag(exp(gk_t)) + b_t a_t^T) S_(t-1) + k_t v_t^T`.

    `a` meets the state before it decays. `o_t = q_t^T S_t`, with `q` scaled.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: what the state is read with, `[B, T, H, K]`.
        b: where what was read is written to, `[B, T, H, K]`.
        gk: log decay, `[B, T, H, K]`; `None` is 0.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `S` before the first token, `[N, H, K, V]`. Default: 0.
        reverse: see `linear_attn`.
        cu_seqlens: see there.

    Returns:
        `o`, `[B, T, H, V]`, and `S` after the last token.
    """
    heads = q.shape[2]
    q, k = queries_and_keys(q, k, scale, heads)

    def step(
        states: States, q: Array, k: Array, v: Array, a: Array, b: Array, *decays: Array
    ) -> tuple[States, Array]:
        (state,) = states
        moved = outer(b, read(a, state))
        for decay in decays:
            state = np.exp(decay) * state
        state = state + moved + outer(k, v)
        return (state,), read(q, state)

    v, a, b = (x.astype(np.float64) for x in (v, a, b))
    tokens = (q, k, v, a, b, *log_decays(None, gk))
    shape = (heads, q.shape[-1], v.shape[-1])
    return recur_matrix(step, tokens, initial_state, shape, reverse=reverse, cu_seqlens=cu_seqlens)


def iplr_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    *,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """The delta rule with identity plus low-rank transitions in float64: `dplr_delta_rule` without decay.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: see `dplr_delta_rule`, also for the arguments that follow.
        b: see there.
        scale: see there.
        initial_state: see there.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    return dplr_delta_rule(q, k, v, a, b, None, scale, initial_state, cu_seqlens=cu_seqlens)


def rwkv7(
    r: Array,
    w: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    scale: float | None = 1.0,
    initial_state: Array | None = None,
    *,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, Float64]:
    """RWKV-7 in float64: `dplr_delta_rule` with other names, another order and without scale.

    RWKV-7 Goose, Peng et al. 2025.

    Args:
        r: receptances, in the place of queries, `[B, T, H, K]`.
        w: log decay, in the place of `gk`, `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: see `dplr_delta_rule`.
        b: see there.
        scale: factor of `r`; `None` is `K ** -0.5`, the default of flash-linear-attention's recurrent form.
        initial_state: see `dplr_delta_rule`.
        cu_seqlens: see there.

    Returns:
        See there.
    """
    return dplr_delta_rule(r, k, v, a, b, w, scale, initial_state, cu_seqlens=cu_seqlens)
