"""xLSTM's matrix memory, with exponential and with sigmoid input gates.

Sources: xLSTM, Beck et al. 2024; Tiled Flash Linear Attention, Beck, Pöppel, Lippe and Hochreiter 2025.
"""

from __future__ import annotations

from math import log
from typing import Any

from .elementwise import exp, running_maximum, sigmoid, softplus
from .inputs import Inputs, check_chunk_size
from .namespace import cast, contiguous, zeros
from .recurrent import recurrent
from .sequences import by_sequence, last_of, spans_of

# The signatures are those of mlstm_kernels.
# ruff: noqa: FBT001, FBT002

# Log decays that are lower leave nothing; sums of an infinite one would have no differences.
_LOWEST = -1e4
# Below the logarithm of the largest number, by one.
_LARGEST = {"float32": 127 * log(2), "float64": 1023 * log(2)}


def mlstm_chunkwise(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    c_initial: Any | None = None,
    n_initial: Any | None = None,
    m_initial: Any | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
    cu_seqlens: Any | None = None,
) -> Any | tuple[Any, tuple[Any, Any, Any]]:
    """Computes the mLSTM with exponential input gates; see `subquad.ops.recurrent`.

    `C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T`, `n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t`,
    `h_t = C_t^T q_t / max(|n_t^T q_t|, 1)` with queries scaled by `K ** -0.5`. States are kept as multiples of `exp(m_t)`,
    `m_t = max(log(sigmoid(f_t)) + m_{t-1}, i_t)`, and `eps` is added to denominators that are divided by it:
    `max(|n_t^T q_t|, exp(-m_t)) + eps`. Half types are computed in float32 until the division. Heads come before tokens.

    Args:
        q: queries, `[B, H, T, K]`.
        k: keys, `[B, H, T, K]`.
        v: values, `[B, H, T, V]`.
        i: input gates before their activation, `[B, H, T]`.
        f: forget gates before their activation, `[B, H, T]`.
        c_initial: `C exp(-m)` before the first token, `[N, H, K, V]`. Given with the two that follow, or not at all: 0.
        n_initial: `n exp(-m)`, `[N, H, K]`.
        m_initial: `m`, `[N, H, 1]`.
        return_last_states: whether to return the states after the last token.
        eps: added to denominators.
        chunk_size: no effect.
        cu_seqlens: where packed sequences start, `[N + 1]`.

    Returns:
        `h`, `[B, H, T, V]`, a view of `[B, T, H, V]`; with `return_last_states` also `(C exp(-m), n exp(-m), m)`, float32, float64
        for float64 inputs.
    """
    check_chunk_size(chunk_size)
    given, q, k, v, i, f = _read(q, k, v, i, f)
    _check_together(c_initial=c_initial, n_initial=n_initial, m_initial=m_initial)
    spans = spans_of(cu_seqlens, given, q.shape[1])
    heads, sequences = q.shape[2], q.shape[0] if spans is None else len(spans)
    if m_initial is None:
        before = zeros(q, (sequences, heads), given.xp.float64)
    else:
        m_initial = given.beside("m_initial", m_initial, sequences, heads, 1)
        before = cast(m_initial[..., 0], given.xp.float64)
    # In float64: exponents are differences of sums over all tokens.
    i, log_f = cast(i, given.xp.float64), _log_sigmoid(cast(f, given.xp.float64))
    stabilised = by_sequence(spans, _stabilise, i, log_f, of_sequences=(before,))
    m = stabilised[..., 1]
    g = given.xp.clip(log_f + stabilised[..., 0] - m, None, 0.0)
    h, weights, states = _remember(
        given,
        q,
        k,
        v,
        g=cast(g, given.sums),
        beta=cast(exp(i - m), given.sums),
        initial=_joined(given, c_initial, n_initial, q, v, sequences),
        cu_seqlens=cu_seqlens,
        output_final_state=return_last_states,
    )
    largest = _LARGEST["float64" if given.sums == given.xp.float64 else "float32"]
    least = cast(exp(-given.xp.clip(m, -largest, None)), given.sums)
    h = _divided(given, h, given.xp.maximum(abs(weights), least[..., None]) + eps)
    if states is None:
        return h
    return h, (*states, cast(last_of(spans, m, before), given.sums)[..., None])


def mlstm_recurrent(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    c_initial: Any | None = None,
    n_initial: Any | None = None,
    m_initial: Any | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    cu_seqlens: Any | None = None,
) -> Any | tuple[Any, tuple[Any, Any, Any]]:
    """Computes what `mlstm_chunkwise` does.

    Args:
        q: `[B, H, T, K]`.
        k: `[B, H, T, K]`.
        v: `[B, H, T, V]`.
        i: `[B, H, T]`.
        f: `[B, H, T]`.
        c_initial: `[N, H, K, V]`.
        n_initial: `[N, H, K]`.
        m_initial: `[N, H, 1]`.
        return_last_states: see there.
        eps: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return mlstm_chunkwise(
        q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, eps, cu_seqlens=cu_seqlens
    )


def mlstm_siging_chunkwise(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    c_initial: Any | None = None,
    n_initial: Any | None = None,
    return_last_states: bool = False,
    normalize: bool = False,
    chunk_size: int = 64,
    cu_seqlens: Any | None = None,
) -> Any | tuple[Any, tuple[Any, Any | None]]:
    """Computes the mLSTM with sigmoid input gates; see `subquad.ops.recurrent`.

    `C_t = sigmoid(f_t) C_{t-1} + sigmoid(i_t) k_t v_t^T`, `h_t = C_t^T q_t` with queries scaled by `K ** -0.5`. With `normalize`,
    `n_t = sigmoid(f_t) n_{t-1} + sigmoid(i_t) k_t`, and `h_t` is divided by `max(|n_t^T q_t|, 1)`; half types are computed in
    float32 until then. Heads come before tokens.

    Args:
        q: queries, `[B, H, T, K]`.
        k: keys, `[B, H, T, K]`.
        v: values, `[B, H, T, V]`.
        i: input gates before their activation, `[B, H, T]`.
        f: forget gates before their activation, `[B, H, T]`.
        c_initial: `C` before the first token, `[N, H, K, V]`. Default: 0.
        n_initial: `n`, `[N, H, K]`, given with `normalize` where `c_initial` is, or not at all.
        return_last_states: whether to return the states after the last token.
        normalize: whether there is a denominator.
        chunk_size: no effect.
        cu_seqlens: where packed sequences start, `[N + 1]`.

    Returns:
        `h`, `[B, H, T, V]`, a view of `[B, T, H, V]`; with `return_last_states` also `(C, n)`, float32, float64 for float64 inputs.
        `n` is `None` without `normalize`.
    """
    check_chunk_size(chunk_size)
    given, q, k, v, i, f = _read(q, k, v, i, f)
    g, beta = _log_sigmoid(f), sigmoid(i)
    if not normalize:
        if n_initial is not None:
            raise ValueError(f"n_initial: expected None without normalize, got {type(n_initial).__name__}")
        h, c = recurrent(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=c_initial,
            cu_seqlens=cu_seqlens,
            output_final_state=return_last_states,
            names={"initial_state": "c_initial"},
        )
        h = h.swapaxes(1, 2)
        return (h, (c, None)) if return_last_states else h
    _check_together(c_initial=c_initial, n_initial=n_initial)
    spans = spans_of(cu_seqlens, given, q.shape[1])
    sequences = q.shape[0] if spans is None else len(spans)
    h, weights, states = _remember(
        given,
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial=_joined(given, c_initial, n_initial, q, v, sequences),
        cu_seqlens=cu_seqlens,
        output_final_state=return_last_states,
    )
    h = _divided(given, h, given.xp.clip(abs(weights), 1.0, None))
    return h if states is None else (h, states)


def mlstm_siging_recurrent(
    q: Any,
    k: Any,
    v: Any,
    i: Any,
    f: Any,
    c_initial: Any | None = None,
    n_initial: Any | None = None,
    return_last_states: bool = False,
    normalize: bool = False,
    cu_seqlens: Any | None = None,
) -> Any | tuple[Any, tuple[Any, Any | None]]:
    """Computes what `mlstm_siging_chunkwise` does.

    Args:
        q: `[B, H, T, K]`.
        k: `[B, H, T, K]`.
        v: `[B, H, T, V]`.
        i: `[B, H, T]`.
        f: `[B, H, T]`.
        c_initial: `[N, H, K, V]`.
        n_initial: `[N, H, K]`.
        return_last_states: see there.
        normalize: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return mlstm_siging_chunkwise(
        q, k, v, i, f, c_initial, n_initial, return_last_states, normalize, cu_seqlens=cu_seqlens
    )


def _read(q: Any, k: Any, v: Any, i: Any, f: Any) -> tuple[Inputs, Any, Any, Any, Any, Any]:
    """Checks what belongs to tokens; returns it with tokens before heads, gates as sums are kept."""
    given = Inputs("q", q, "B, H, T, K")
    batch, heads, tokens, width = q.shape
    k = given.alike("k", k, batch, heads, tokens, width)
    v = given.alike("v", v, batch, heads, tokens, "V")
    i = given.beside("i", i, batch, heads, tokens)
    f = given.beside("f", f, batch, heads, tokens)
    return given, *(x.swapaxes(1, 2) for x in (q, k, v, i, f))


def _log_sigmoid(x: Any) -> Any:
    return -softplus(-x)


def _stabilise(i: Any, log_f: Any, before: Any) -> Any:
    """Returns `m` of the token before each, and of the token itself, `[B, T, H, 2]`.

    Args:
        i: `[B, T, H]`.
        log_f: `[B, T, H]`.
        before: `m` before the first token, `[B, H]`.
    """
    given = Inputs("i", i, "B, T, H")
    xp, first = given.xp, before[:, None]
    total = xp.cumsum(xp.clip(log_f, _LOWEST, None), 1)
    m = total + xp.maximum(running_maximum(i - total), first)
    return xp.stack([xp.concatenate([first, m], 1)[:, :-1], m], -1)


def _check_together(**states: Any) -> None:
    """Raises `TypeError` where some states are given and others are not."""
    present = [name for name, state in states.items() if state is not None]
    for name, state in states.items():
        if present and state is None:
            raise TypeError(f"{name}: expected an array, as {present[0]} is given, got None")


def _joined(given: Inputs, c: Any | None, n: Any | None, q: Any, v: Any, sequences: int) -> Any | None:
    """Returns the states with the sums of keys as the last column, `[N, H, K, V + 1]`."""
    if c is None or n is None:
        return None
    heads, width = q.shape[2:]
    c = given.beside("c_initial", c, sequences, heads, width, v.shape[3])
    n = given.beside("n_initial", n, sequences, heads, width)
    return given.xp.concatenate([c, n[..., None]], -1)


def _remember(
    given: Inputs,
    q: Any,
    k: Any,
    v: Any,
    *,
    initial: Any | None,
    output_final_state: bool,
    **options: Any,
) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """Returns numerators, what denominators are made of, and `(C, n)` or `None`."""
    width = v.shape[3]
    q, k, v = (cast(x, given.sums) for x in (q, k, v))
    # The sums of keys are what a value of 1 in all tokens would give.
    v = given.xp.concatenate([v, given.xp.ones_like(v[..., :1])], -1)
    o, final = recurrent(q, k, v, initial_state=initial, output_final_state=output_final_state, **options)
    states = None if final is None else (contiguous(final[..., :width]), contiguous(final[..., width]))
    return o[..., :width], o[..., width:], states


def _divided(given: Inputs, numerators: Any, denominators: Any) -> Any:
    """Returns `h` of the dtype of the inputs, with heads before tokens."""
    return cast(numerators / denominators, given.first.dtype).swapaxes(1, 2)
