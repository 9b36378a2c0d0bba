"""Attention to slots that are written with decay: gated slot attention and ABC."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import queries_and_keys, repeat_heads
from .recurrence import States, first_state, outer, read, recur

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def gsa(
    q: Array,
    k: Array,
    v: Array,
    s: Array,
    g: Array | None = None,
    scale: float | None = None,
    initial_state: tuple[Array, Array] | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Float64, tuple[Float64, Float64]]:
    """Gated slot attention in float64: softmax attention to `M` slots.

    `hk_t = hk_(t-1) diag(exp(g_t)) + k_t s_t^T`, `hv_t = diag(exp(g_t)) hv_(t-1) + s_t v_t^T`, `o_t = softmax(q_t^T hk_t) hv_t`.

    Without `g` slots are averages of the keys and values so far with the weights `exp(s)` (ABC): with
    `z_t = log(exp(z_(t-1)) + exp(s_t))`, `g_t = z_(t-1) - z_t`, and `exp(s_t - z_t)` is in the place of `s_t`. `z` is no part of
    the state, so that a sequence cannot be continued: the first token's `g` is 0.

    Gated Slot Attention, Zhang et al. 2024; ABC, Peng et al. 2022.

    Args:
        q: `[B, T, HQ, K]`.
        k: `[B, T, H, K]`, `H` a divisor of `HQ`.
        v: `[B, T, H, V]`.
        s: how strongly each slot is written, `[B, T, H, M]`.
        g: log decay of each slot, `[B, T, H, M]`, or `None`.
        scale: factor of the queries. Default: `K ** -0.5`.
        initial_state: `(hk, hv)` before the first token, `[N, H, K, M]` and `[N, H, M, V]`. Default: 0.
        reverse: see `linear_attn`.
        cu_seqlens: see there.

    Returns:
        `o`, `[B, T, HQ, V]`, and `(hk, hv)` after the last token.
    """
    batch, _, heads, width = q.shape
    group, slots, width_v = heads // k.shape[2], s.shape[-1], v.shape[-1]
    q, k = queries_and_keys(q, k, scale, heads)
    v, s = (repeat_heads(x.astype(np.float64), heads) for x in (v, s))

    def write(hk: Array, hv: Array, k: Array, v: Array, s: Array, g: Array) -> tuple[Array, Array]:
        hk = hk * np.exp(g)[..., None, :] + outer(k, s)
        hv = hv * np.exp(g)[..., :, None] + outer(s, v)
        return hk, hv

    def gated(states: States, q: Array, k: Array, v: Array, s: Array, g: Array) -> tuple[States, Array]:
        hk, hv = states
        hk, hv = write(hk, hv, k, v, s, g)
        return (hk, hv), read(_softmax(read(q, hk)), hv)

    def averaged(states: States, q: Array, k: Array, v: Array, s: Array) -> tuple[States, Array]:
        hk, hv, z = states
        z_new = np.logaddexp(z, s)
        g = np.where(np.isneginf(z), 0.0, z - z_new)
        hk, hv = write(hk, hv, k, v, np.exp(s - z_new), g)
        return (hk, hv, z_new), read(_softmax(read(q, hk)), hv)

    first = (
        (None, None) if initial_state is None else tuple(np.repeat(x, group, axis=1) for x in initial_state)
    )
    hk = first_state(first[0], (heads, width, slots), batch, cu_seqlens)
    hv = first_state(first[1], (heads, slots, width_v), batch, cu_seqlens)
    options: dict[str, Any] = {"reverse": reverse, "cu_seqlens": cu_seqlens}
    if g is None:
        z = np.full((len(hk), heads, slots), -np.inf)
        o, (hk, hv, _) = recur(averaged, (q, k, v, s), (hk, hv, z), (heads, width_v), **options)
    else:
        g = repeat_heads(g.astype(np.float64), heads)
        o, (hk, hv) = recur(gated, (q, k, v, s, g), (hk, hv), (heads, width_v), **options)
    return o, (hk[:, ::group], hv[:, ::group])


def _softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    normed: Array = weights / weights.sum(axis=-1, keepdims=True)
    return normed
