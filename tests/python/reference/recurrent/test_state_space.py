"""State spaces against sums over pairs of tokens, against each other, and steps against scans."""

import numpy as np
import pytest

from subquad.reference import recurrent

B, T, H, G, P, N, D = 2, 6, 4, 2, 3, 5, 4
GENERATOR = np.random.default_rng(6)


def numbers(*shape):
    return GENERATOR.standard_normal(shape)


def positive(*shape):
    return np.exp(numbers(*shape))


def silu(x):
    return x / (1 + np.exp(-x))


X, DT, A = numbers(B, T, H, P), positive(B, T, H) / 2, -positive(H)
B_, C_ = numbers(B, T, G, N), numbers(B, T, G, N)
STATES = numbers(B, H, P, N)
U, DELTA, RATES = numbers(B, D, T), positive(B, D, T) / 2, -positive(D, N)


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


def dual(dt, state, same=None):
    """Output without `D` and gate, and final state, as attention with decays.

    Args:
        dt: `[B, T, H]`.
        state: `[B, H, P, N]`.
        same: whether tokens are of one sequence, `[B, T, T]`, and whether a token still sees the state, `[B, T]`.
    """
    b, c = (np.stack([x[:, :, h * G // H] for h in range(H)], axis=2) for x in (B_, C_))
    decay, start = np.zeros((B, T, T, H)), np.exp(np.cumsum(dt * A, axis=1))
    for t, s in np.ndindex(T, T):
        decay[:, t, s] = np.exp((dt * A)[:, s + 1 : t + 1].sum(axis=1)) if s <= t else 0
    if same is not None:
        decay, start = decay * same[0][..., None], start * same[1][..., None]
    y = np.einsum("bthn,bshn,btsh,bsh,bshp->bthp", c, b, decay, dt, X)
    y = y + np.einsum("bthn,bhpn,bth->bthp", c, state, start)
    final = np.einsum("bshn,bsh,bsh,bshp->bhpn", b, decay[:, -1], dt, X)
    return y, final + state * start[:, -1, :, None, None]


def test_ssd():
    check(
        recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, None, initial_states=STATES), dual(DT, STATES)
    )
    check(recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, 64), dual(DT, 0 * STATES))


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_skip_and_gate(by_channel, gated):
    skip, z = numbers(H, P) if by_channel else numbers(H), numbers(B, T, H, P)
    y, final = dual(DT, STATES)
    y = y + (skip if by_channel else skip[:, None]) * X
    options = {"D": skip, "z": z if gated else None, "initial_states": STATES}
    expected = y * silu(z) if gated else y, final
    check(recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, **options), expected)


def test_step_sizes():
    raw, bias = numbers(B, T, H), numbers(H)
    for softplus, limits in [
        (False, (0, np.inf)),
        (True, (0, np.inf)),
        (True, (0.4, 0.9)),
        (False, (0.1, 2)),
    ]:
        dt = np.log(1 + np.exp(raw + bias)) if softplus else raw + bias
        expected = dual(np.minimum(np.maximum(dt, limits[0]), limits[1]), STATES)
        options = {"dt_bias": bias, "dt_softplus": softplus, "dt_limit": limits, "initial_states": STATES}
        check(recurrent.mamba_chunk_scan_combined(X, raw, A, B_, C_, **options), expected)


def test_sequences_by_number():
    seq_idx = np.array([[0, 0, 1, 1, 1, 4], [2, 2, 2, -1, 0, 0]])
    # What comes before the first token is sequence 0, so that the second row does not see its state.
    same = seq_idx[:, :, None] == seq_idx[:, None]
    sees_state = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    for kind in (np.int32, np.int64):
        options = {"seq_idx": seq_idx.astype(kind), "initial_states": STATES}
        found = recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, **options)
        check(found, dual(DT, STATES, (same, sees_state)))


def test_packed_sequences_need_no_numbers():
    seq_idx, bounds = np.array([[0, 0, 1, 1, 1, 2]]), np.array([0, 2, 5, 6])
    arguments = (X[:1], DT[:1], A, B_[:1], C_[:1])
    y, last = recurrent.mamba_chunk_scan_combined(*arguments, seq_idx=seq_idx)
    found, finals = recurrent.mamba_chunk_scan_combined(*arguments, cu_seqlens=bounds)
    check((found, finals[2:]), (y, last))
    both = recurrent.mamba_chunk_scan_combined(*arguments, seq_idx=seq_idx, cu_seqlens=bounds)
    check(both, (found, finals))


def test_packed_sequences_begin_with_their_states():
    seq_idx, bounds, states = np.array([[3, 3, 1, 1, 1, 2]]), np.array([0, 2, 6]), numbers(2, H, P, N)
    arguments = (X[:1], DT[:1], A, B_[:1], C_[:1])
    found, finals = recurrent.mamba_chunk_scan_combined(
        *arguments, initial_states=states, seq_idx=seq_idx, cu_seqlens=bounds
    )
    expected = []
    for first, end, state in ((0, 2, states[:1]), (2, 5, states[1:]), (5, 6, None)):
        part = [y[:, first:end] if y.ndim > 1 else y for y in arguments]
        expected.append(recurrent.mamba_chunk_scan_combined(*part, initial_states=state))
    check((found,), (np.concatenate([y for y, _ in expected], axis=1),))
    check((finals,), (np.concatenate([expected[0][1], expected[2][1]]),))


def test_ssd_is_a_selective_scan_with_one_rate_per_head():
    skip, z, bias = numbers(H), numbers(B, T, H, P), numbers(H)
    options = {"D": skip, "z": z, "dt_bias": bias, "dt_softplus": True, "initial_states": STATES}
    y, final = recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, **options)

    def channels(x):
        return np.moveaxis(x.reshape(B, T, H * P), 1, 2)

    found, state = recurrent.selective_scan_fn(
        channels(X),
        channels(np.repeat(DT[..., None], P, axis=-1)),
        np.repeat(A, P)[:, None] * np.ones(N),
        np.moveaxis(B_, 1, 3),
        np.moveaxis(C_, 1, 3),
        np.repeat(skip, P),
        channels(z),
        np.repeat(bias, P),
        delta_softplus=True,
        initial_state=STATES.reshape(B, H * P, N),
    )
    check((found, state), (channels(y), final.reshape(B, H * P, N)))


def test_ssd_is_simple_gla():
    y, final = recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, initial_states=STATES)
    b, c = (np.repeat(x, H // G, axis=2) for x in (B_, C_))
    options = {"initial_state": STATES, "state_v_first": True}
    check((y, final), recurrent.simple_gla(c, b, DT[..., None] * X, DT * A, None, 1.0, **options))


def of_channel(x, row, d):
    """`B` or `C` of one channel, `[N, T]`, of any form."""
    if x.ndim == 2:
        return np.repeat(x[d][:, None], T, axis=1)
    return x[row] if x.ndim == 3 else x[row, d * x.shape[1] // D]


@pytest.mark.parametrize("shape", [(B, N, T), (B, 2, N, T), (D, N)], ids=["tokens", "groups", "constant"])
@pytest.mark.parametrize("gated", [False, True])
def test_selective_scan(shape, gated):
    b, c, h, skip, z = numbers(*shape), numbers(*shape), numbers(B, D, N), numbers(D), numbers(B, D, T)
    y, final = np.zeros((B, D, T)), np.zeros((B, D, N))
    for row, d, n in np.ndindex(B, D, N):
        line_b, line_c = (of_channel(x, row, d)[n] for x in (b, c))
        for t in range(T):
            total = h[row, d, n] * np.exp(RATES[d, n] * DELTA[row, d, : t + 1].sum())
            for s in range(t + 1):
                decay = np.exp(RATES[d, n] * DELTA[row, d, s + 1 : t + 1].sum())
                total += decay * DELTA[row, d, s] * line_b[s] * U[row, d, s]
            y[row, d, t] += line_c[t] * total
        final[row, d, n] = total
    found = recurrent.selective_scan_fn(
        U, DELTA, RATES, b, c, skip if gated else None, z if gated else None, initial_state=h
    )
    check(found, ((y + skip[:, None] * U) * silu(z) if gated else y, final))


def test_step_sizes_of_the_selective_scan():
    raw, bias, b, c = numbers(B, D, T), numbers(D), numbers(B, N, T), numbers(B, N, T)
    for softplus in (False, True):
        delta = raw + bias[:, None]
        delta = np.log(1 + np.exp(delta)) if softplus else delta
        found = recurrent.selective_scan_fn(U, raw, RATES, b, c, None, None, bias, delta_softplus=softplus)
        check(found, recurrent.selective_scan_fn(U, delta, RATES, b, c))


def test_steps_are_a_scan():
    bias, skip, z, h = numbers(D), numbers(D), numbers(B, D, T), numbers(B, D, N)
    b, c = numbers(B, N, T), numbers(B, N, T)
    options = {"delta_softplus": True, "initial_state": h}
    y, final = recurrent.selective_scan_fn(U, DELTA, RATES, b, c, skip, z, bias, **options)
    for t in range(T):
        arguments = (U[..., t], DELTA[..., t], RATES, b[..., t], c[..., t], skip, z[..., t], bias)
        out, h = recurrent.selective_state_update(h, *arguments, dt_softplus=True)
        check((out,), (y[..., t],))
    check((h,), (final,))


def test_steps_with_heads_are_the_dual():
    bias, skip, z = numbers(H), numbers(H), numbers(B, T, H, P)
    options = {"D": skip, "z": z, "dt_bias": bias, "dt_softplus": True, "initial_states": STATES}
    y, final = recurrent.mamba_chunk_scan_combined(X, DT, A, B_, C_, **options)
    wide = {"D": np.repeat(skip[:, None], P, axis=1), "dt_bias": np.repeat(bias[:, None], P, axis=1)}
    rates, state = np.broadcast_to(A[:, None, None], (H, P, N)), STATES
    for t in range(T):
        dt = np.broadcast_to(DT[:, t, :, None], (B, H, P))
        out, state = recurrent.selective_state_update(
            state, X[:, t], dt, rates, B_[:, t], C_[:, t], z=z[:, t], dt_softplus=True, **wide
        )
        check((out,), (y[:, t],))
    check((state,), (final,))


@pytest.mark.parametrize("has_heads", [False, True])
def test_steps_choose_their_states(has_heads):
    heads = (H,) if has_heads else ()
    pool, rows = numbers(5, *heads, P, N), np.array([3, -1, 0])
    x, dt, z = (numbers(3, *heads, P) for _ in range(3))
    b, c = numbers(3, N), numbers(3, N)
    rates, skip = -positive(*heads, P, N), numbers(*heads, P)
    before = pool.copy()
    indices = {"state_batch_indices": rows}
    out, states = recurrent.selective_state_update(pool, x, dt, rates, b, c, skip, z, **indices)
    live = [0, 2]
    alone, moved = recurrent.selective_state_update(
        pool[rows[live]], x[live], dt[live], rates, b[live], c[live], skip, z[live]
    )
    check((out[live], states[rows[live]]), (alone, moved))
    assert (out[1] == 0).all()
    np.testing.assert_array_equal(states[[1, 2, 4]], pool[[1, 2, 4]])
    np.testing.assert_array_equal(pool, before)
