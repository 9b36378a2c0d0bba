"""Gated slot attention: softmax attention to slots that are written with decay.

Sources: Gated Slot Attention, Zhang et al. 2024; without gates ABC, Peng et al. 2022.
"""

from __future__ import annotations

from typing import Any

from .additive_gates import averages
from .elementwise import softmax
from .inputs import Inputs, state_pair
from .namespace import backwards, cast, contiguous, repeated_heads
from .recurrent import recurrent, require
from .sequences import spans_backwards, spans_of

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_gsa(
    q: Any,
    k: Any,
    v: Any,
    s: Any,
    g: Any | None = None,
    scale: float | None = None,
    initial_state: tuple[Any, Any] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, tuple[Any | None, Any | None]]:
    """Computes gated slot attention; see `subquad.ops.recurrent`.

    `hk_t = hk_{t-1} diag(exp(g_t)) + k_t s_t^T`, `hv_t = diag(exp(g_t)) hv_{t-1} + s_t v_t^T`,
    `o_t = hv_t^T softmax(scale * hk_t^T q_t)`; half types are computed in float32.

    Without `g` slots are averages of the keys and values so far with the weights `exp(s)` (ABC): with
    `z_t = log(exp(z_{t-1}) + exp(s_t))`, `g_t = z_{t-1} - z_t`, and `exp(s_t - z_t)` is in the place of `s_t`. `z` is no part of
    the state: the `g` of the first token is 0.

    Args:
        q: queries, `[B, T, HQ, K]`.
        k: keys, `[B, T, H, K]`, `H` a divisor of `HQ`.
        v: values, `[B, T, H, V]`.
        s: how strongly each slot is written, `[B, T, H, M]`.
        g: log decay of each slot, `[B, T, H, M]`, or `None`.
        scale: factor of the scores. Default: `K ** -0.5`.
        initial_state: `(hk, hv)`, `[N, H, K, M]` and `[N, H, M, V]`.
        output_final_state: whether to return the final state.
        checkpoint_level: no effect.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, HQ, V]`, and the final state, a pair, of `None` if it is not asked for.
    """
    del checkpoint_level, cu_seqlens_cpu
    options: dict[str, Any] = {
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "unknown": kwargs,
    }
    return _slots(q, k, v, s, g, scale, initial_state, **options)


def chunk_abc(
    q: Any,
    k: Any,
    v: Any,
    s: Any,
    initial_state: tuple[Any, Any] | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Any | None = None,
) -> tuple[Any, tuple[Any, Any] | None]:
    """Computes attention to averages of keys and values (ABC): `chunk_gsa` without `g`.

    Args:
        q: `[B, T, HQ, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        s: logarithms of the weights of averages, `[B, T, H, M]`.
        initial_state: `[N, H, K, M]` and `[N, H, M, V]`.
        output_final_state: see there.
        scale: see there; flash-linear-attention has the default only.
        cu_seqlens: `[N + 1]`, which flash-linear-attention does not take.

    Returns:
        The outputs, `[B, T, HQ, V]`, and the final state, a pair, or `None`.
    """
    options: dict[str, Any] = {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    o, final = _slots(q, k, v, s, None, scale, initial_state, **options)
    return o, final if output_final_state else None


def fused_recurrent_gsa(
    q: Any,
    k: Any,
    v: Any,
    s: Any,
    g: Any | None = None,
    scale: float | None = None,
    initial_state: tuple[Any, Any] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, tuple[Any | None, Any | None]]:
    """Computes what `chunk_gsa` does.

    Args:
        q: `[B, T, HQ, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        s: `[B, T, H, M]`.
        g: `[B, T, H, M]`.
        scale: see there.
        initial_state: `[N, H, K, M]` and `[N, H, M, V]`.
        output_final_state: see there.
        reverse: whether sequences are read from the last token to the first; averages are then of the tokens that follow.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    options: dict[str, Any] = {
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "reverse": reverse,
    }
    return _slots(q, k, v, s, g, scale, initial_state, **options)


def _slots(
    q: Any,
    k: Any,
    v: Any,
    s: Any,
    g: Any | None,
    scale: float | None,
    initial_state: tuple[Any, Any] | None,
    *,
    cu_seqlens: Any | None,
    reverse: bool = False,
    **options: Any,
) -> tuple[Any, tuple[Any | None, Any | None]]:
    require(q=q, k=k, v=v, s=s)
    given = Inputs("q", q, "B, T, HQ, K")
    batch, tokens, heads, width = q.shape
    k = given.alike("k", k, batch, tokens, "H", width)
    kept = k.shape[2]
    if heads != kept and (kept == 0 or heads % kept):
        raise ValueError(f"k: expected a number of heads that divides {heads}, that of q, got {kept}")
    v = given.alike("v", v, batch, tokens, kept, "V")
    s = given.alike("s", s, batch, tokens, kept, "M")
    slots, width_v = s.shape[3], v.shape[3]
    if not slots:
        raise ValueError(f"s: expected one slot or more, got shape {tuple(s.shape)}")
    spans = spans_of(cu_seqlens, given, tokens)
    if g is None and reverse:
        s, g, _ = averages(given, backwards("s", s, 1), spans_backwards(spans, tokens))
        s, g = backwards("s", s, 1), backwards("g", g, 1)
    elif g is None:
        s, g, _ = averages(given, s, spans)
    else:
        g = given.beside("g", g, batch, tokens, kept, slots)
    hk, hv = state_pair(initial_state, "hk, hv")
    sequences = batch if spans is None else len(spans)
    if hk is not None:
        hk = given.beside("initial_state", hk, sequences, kept, width, slots)
    if hv is not None:
        hv = given.beside("initial_state", hv, sequences, kept, slots, width_v)

    group = heads // max(kept, 1)
    q = cast(q, given.sums)
    k, v, s, g = (repeated_heads(cast(x, given.sums), group, 2) for x in (k, v, s, g))
    hk, hv = (None if x is None else repeated_heads(x, group, 1) for x in (hk, hv))
    options |= {"cu_seqlens": cu_seqlens, "reverse": reverse}
    # Decays of columns: each slot is a value head of its own, of width 1.
    columns = (batch, tokens, heads * slots)
    scores, hk = recurrent(
        q,
        k,
        s.reshape((*columns, 1)),
        g=g.reshape(columns),
        scale=scale,
        initial_state=None if hk is None else _turned(hk).reshape((sequences, heads * slots, width, 1)),
        names={"v": "s"},
        **options,
    )
    weights = softmax(scores.reshape((batch, tokens, heads, slots)))
    o, hv = recurrent(
        weights, s, v, gk=g, scale=1.0, initial_state=hv, names={"q": "s", "gk": "g"}, **options
    )
    if hk is not None and hv is not None:
        hk = contiguous(_turned(hk.reshape((sequences, heads, slots, width))[:, ::group]))
        hv = contiguous(hv[:, ::group]) if group > 1 else hv
    return cast(o, given.first.dtype), (hk, hv)


def _turned(hk: Any) -> Any:
    return hk.swapaxes(-1, -2)
