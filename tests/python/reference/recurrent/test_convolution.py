"""The causal convolution against its sum, and updates against the whole."""

from itertools import pairwise

import numpy as np
import pytest

from subquad.reference import recurrent

B, D, T = 2, 3, 7
GENERATOR = np.random.default_rng(8)


def numbers(*shape):
    return GENERATOR.standard_normal(shape)


X, BIAS = numbers(B, D, T), numbers(D)


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(x, weight, past):
    taps = weight.shape[1]
    y = np.zeros(x.shape)
    for b, d, t in np.ndindex(x.shape):
        for j in range(taps):
            s = t - taps + 1 + j
            y[b, d, t] += weight[d, j] * (x[b, d, s] if s >= 0 else past[b, d, s])
    return y


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 9])
def test_convolution(taps):
    weight, past = numbers(D, taps), numbers(B, D, taps - 1)
    last = np.concatenate([past, X], axis=-1)[..., T:]
    y = by_hand(X, weight, past)
    check(recurrent.causal_conv1d_fn(X, weight, initial_states=past), (y, last))
    check(recurrent.causal_conv1d_fn(X, weight, BIAS, None, past), (y + BIAS[:, None], last))
    for activation in ("silu", "swish"):
        found = recurrent.causal_conv1d_fn(X, weight, BIAS, None, past, activation=activation)
        check(found, (silu(y + BIAS[:, None]), last))
    zeros = recurrent.causal_conv1d_fn(X, weight)
    check(zeros, (by_hand(X, weight, 0 * past), np.concatenate([0 * past, X], axis=-1)[..., T:]))


def test_the_last_weight_is_the_current_tokens():
    weight = np.zeros((D, 4))
    weight[:, 3] = 2
    check(recurrent.causal_conv1d_fn(X, weight)[:1], (2 * X,))
    weight[:, 2:] = [1, 0]
    y, _ = recurrent.causal_conv1d_fn(X, weight)
    check((y[..., 1:], y[..., 0]), (X[..., :-1], np.zeros((B, D))))


def test_sequences_by_number():
    weight = numbers(D, 4)
    seq_idx = np.array([[0, 0, 0, 1, 1, 5, 5], [3, 3, 3, 3, -1, -1, 4]])
    y, past = recurrent.causal_conv1d_fn(X, weight, BIAS, seq_idx.astype(np.int32), activation="silu")
    for b in range(B):
        for number in set(seq_idx[b].tolist()):
            places = seq_idx[b] == number
            alone, last = recurrent.causal_conv1d_fn(
                X[b : b + 1][..., places], weight, BIAS, activation="silu"
            )
            check((y[b : b + 1][..., places],), (alone if number >= 0 else 0 * alone,))
            if places[-1]:
                check((past[b : b + 1],), (last,))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("room", [0, 1, 5])
@pytest.mark.parametrize("cuts", [range(T + 1), [0, 3, 4, T], [0, T]], ids=["single", "some", "all"])
def test_updates_are_the_whole(taps, room, cuts):
    weight, state = numbers(D, taps), numbers(B, D, taps - 1 + room)
    past = state[..., room:]
    line = np.concatenate([state, X], axis=-1)
    y, _ = recurrent.causal_conv1d_fn(X, weight, BIAS, None, past, activation="silu")
    for start, end in pairwise(cuts):
        before = state.copy()
        out, new = recurrent.causal_conv1d_update(X[..., start:end], state, weight, BIAS, "silu")
        np.testing.assert_array_equal(state, before)
        np.testing.assert_array_equal(new, line[..., end : end + taps - 1 + room])
        check((out,), (y[..., start:end],))
        state = new


def test_an_update_may_have_no_axis_of_tokens():
    weight, state = numbers(D, 4), numbers(B, D, 3)
    out, new = recurrent.causal_conv1d_update(X[..., 0], state, weight, BIAS)
    expected, last = recurrent.causal_conv1d_update(X[..., :1], state, weight, BIAS)
    check((out, new), (expected[..., 0], last))


@pytest.mark.parametrize("size", [3, 5, 16])
@pytest.mark.parametrize("cuts", [range(T + 1), [0, 3, 4, T]], ids=["single", "some"])
def test_circular_states(size, cuts):
    weight, seen = numbers(D, 4), np.array([2, 11])
    past = numbers(B, D, 3)
    state = np.full((B, D, size), np.nan)
    for b, j in np.ndindex(B, 3):
        state[b, :, (seen[b] - 3 + j) % size] = past[b, :, j]
    y, _ = recurrent.causal_conv1d_fn(X, weight, BIAS, None, past, activation="swish")
    for start, end in pairwise(cuts):
        counts = (seen + start).astype(np.int32)
        arguments = (X[..., start:end], state, weight, BIAS, "swish", counts)
        out, state = recurrent.causal_conv1d_update(*arguments)
        check((out,), (y[..., start:end],))
    for b, t in np.ndindex(B, min(size, T)):
        np.testing.assert_array_equal(state[b, :, (seen[b] + T - 1 - t) % size], X[b, :, T - 1 - t])


@pytest.mark.parametrize("circular", [False, True])
def test_updates_choose_their_states(circular):
    weight, pool, rows = numbers(D, 4), numbers(5, D, 6), np.array([4, -1, 2])
    x, counts = numbers(3, D, 2), np.array([7, 8, 9]) if circular else None
    out, states = recurrent.causal_conv1d_update(x, pool, weight, BIAS, None, counts, rows)
    live = [0, 2]
    alone, moved = recurrent.causal_conv1d_update(
        x[live], pool[rows[live]], weight, BIAS, None, None if counts is None else counts[live]
    )
    check((out[live], states[rows[live]]), (alone, moved))
    assert (out[1] == 0).all()
    np.testing.assert_array_equal(states[[0, 1, 3]], pool[[0, 1, 3]])
