"""The mLSTM against its parallel form, which has no max state."""

import numpy as np
import pytest

from subquad.reference import recurrent

B, T, H, K, V = 2, 7, 2, 4, 3
GENERATOR = np.random.default_rng(9)


def numbers(*shape, width=1.0):
    return GENERATOR.standard_normal(shape) * width


Q, KEYS, VALUES = numbers(B, T, H, K, width=3), numbers(B, T, H, K), numbers(B, T, H, V)
WRITE, FORGET = numbers(B, T, H, width=2), numbers(B, T, H, width=2)
C, N, M = numbers(B, H, K, V), numbers(B, H, K), numbers(B, H)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def parallel(write, state, *, scale, least):
    """Output, final `C` and final `n` where token `s` is written with `write[:, s]`; denominators are at least `least`, or 1."""
    forget = sigmoid(FORGET)
    decay, start = np.zeros((B, T, T, H)), np.cumprod(forget, axis=1)
    for t, s in np.ndindex(T, T):
        decay[:, t, s] = np.prod(forget[:, s + 1 : t + 1], axis=1) * write[:, s] if s <= t else 0
    c = np.einsum("btsh,bshk,bshv->bthkv", decay, KEYS, VALUES) + start[..., None, None] * state[0][:, None]
    n = np.einsum("btsh,bshk->bthk", decay, KEYS) + start[..., None] * state[1][:, None]
    above = scale * np.einsum("bthk,bthkv->bthv", Q, c)
    below = np.abs(scale * np.einsum("bthk,bthk->bth", Q, n))
    below = np.ones_like(below) if least is None else np.maximum(below, least)
    return above / below[..., None], c[:, -1], n[:, -1]


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [None, -0.8])
@pytest.mark.parametrize("has_state", [False, True])
def test_mlstm(scale, has_state):
    state = (C, N, M) if has_state else None
    o, (c, n, m_last) = recurrent.mlstm(Q, KEYS, VALUES, WRITE, FORGET, scale, state, eps=0.0)
    real = (C * np.exp(M)[..., None, None], N * np.exp(M)[..., None]) if has_state else (0 * C, 0 * N)
    expected = parallel(np.exp(WRITE), real, scale=K**-0.5 if scale is None else scale, least=1)
    check((o, c * np.exp(m_last)[..., None, None], n * np.exp(m_last)[..., None]), expected)
    # Both the least denominator and larger ones occur.
    free = parallel(np.exp(WRITE), real, scale=K**-0.5 if scale is None else scale, least=0)[0]
    assert 0 < np.isclose(free, expected[0]).sum() < o.size


def test_the_max_state_is_the_largest_exponent():
    log_f = np.log(sigmoid(FORGET))
    for start in (0.0, 50.0):
        m = np.full((B, H), start)
        exponents = [m + log_f.sum(axis=1)]
        exponents += [WRITE[:, s] + log_f[:, s + 1 :].sum(axis=1) for s in range(T)]
        _, (_, _, last) = recurrent.mlstm(Q, KEYS, VALUES, WRITE, FORGET, None, (C, N, m))
        np.testing.assert_allclose(last, np.max(exponents, axis=0), rtol=1e-12)


def test_large_input_gates_do_not_overflow():
    o, (c, n, m) = recurrent.mlstm(Q, KEYS, VALUES, WRITE + 2000, FORGET, eps=0.0)
    # The constant cancels where the denominator is not the least one.
    check((o,), (recurrent.mlstm(Q, KEYS, VALUES, WRITE + 200, FORGET, eps=0.0)[0],))
    for x in (o, c, n, m):
        assert np.isfinite(x).all()
    nothing, _ = recurrent.mlstm(Q, KEYS, VALUES, WRITE - 2000, FORGET)
    assert (nothing == 0).all()


def test_eps_is_added_to_stabilised_denominators():
    exact, (_, _, m) = recurrent.mlstm(
        Q[:, :1], KEYS[:, :1], VALUES[:, :1], WRITE[:, :1], FORGET[:, :1], 1.0, eps=0.0
    )
    found, _ = recurrent.mlstm(
        Q[:, :1], KEYS[:, :1], VALUES[:, :1], WRITE[:, :1], FORGET[:, :1], 1.0, eps=0.5
    )
    n = KEYS[:, 0] * np.exp(WRITE[:, 0] - m)[..., None]
    norm = np.maximum(np.abs((Q[:, 0] * n).sum(axis=-1)), np.exp(-m))
    check((found[:, 0],), (exact[:, 0] * (norm / (norm + 0.5))[..., None],))


@pytest.mark.parametrize("scale", [None, -0.8])
@pytest.mark.parametrize("normalize", [False, True])
def test_mlstm_sigmoid(scale, normalize):
    options = {"scale": K**-0.5 if scale is None else scale, "least": 1 if normalize else None}
    o, c, n = parallel(sigmoid(WRITE), (C, N), **options)
    state = (C, N) if normalize else C
    found, final = recurrent.mlstm_sigmoid(Q, KEYS, VALUES, WRITE, FORGET, scale, state, normalize=normalize)
    check((found, *(final if normalize else (final,))), (o, c, n) if normalize else (o, c))


def test_mlstm_sigmoid_is_simple_gla():
    values = sigmoid(WRITE)[..., None] * VALUES
    check(
        recurrent.mlstm_sigmoid(Q, KEYS, VALUES, WRITE, FORGET),
        recurrent.simple_gla(Q, KEYS, values, np.log(sigmoid(FORGET))),
    )
