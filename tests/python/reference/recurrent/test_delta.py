"""Delta rules against products of their transition matrices, and against the triangular system that they solve."""

import math

import numpy as np
import pytest

from subquad.reference import recurrent

B, T, H, HV, K, V, N = 2, 5, 2, 4, 4, 3, 3
GENERATOR = np.random.default_rng(4)


def numbers(*shape):
    return GENERATOR.standard_normal(shape)


def decays(*shape):
    return -np.exp(numbers(*shape))


def strengths(*shape):
    return GENERATOR.random(shape) * 2


Q, KEYS, VALUES = numbers(B, T, H, K), numbers(B, T, H, K) / 2, numbers(B, T, H, V)
STATE = numbers(B, H, K, V)


def unrolled(q, transitions, writes, state, scale):
    """Output and final state of `S_t = M_t S_(t-1) + W_t` as sums of products of matrices.

    Args:
        q: `[B, T, H, K]`.
        transitions: `M`, `[B, T, H, K, K]`.
        writes: `W`, `[B, T, H, K, V]`.
        state: `[B, H, K, V]`.
        scale: of `q`.
    """
    length, states = q.shape[1], []
    for t in range(length):
        product, total = np.broadcast_to(np.eye(q.shape[-1]), transitions[:, 0].shape), 0
        for s in range(t, -1, -1):
            total = total + product @ writes[:, s]
            product = product @ transitions[:, s]
        states.append(total + product @ state)
    states = np.stack(states, axis=1)
    return scale * (q[..., None, :] @ states)[..., 0, :], states[:, -1]


def dyads(x, y):
    return x[..., :, None] * y[..., None, :]


def reflections(k, beta):
    """`I - beta k k^T`."""
    return np.eye(k.shape[-1]) - beta[..., None, None] * dyads(k, k)


def diagonals(g):
    return np.exp(g)[..., None] * np.eye(g.shape[-1])


def grouped(x):
    """Heads of queries and keys for each head of values."""
    return np.stack([x[:, :, h * H // HV] for h in range(HV)], axis=2)


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("scale", [None, -0.3])
def test_delta_rule(scale):
    beta = strengths(B, T, H)
    writes = beta[..., None, None] * dyads(KEYS, VALUES)
    expected = unrolled(Q, reflections(KEYS, beta), writes, STATE, K**-0.5 if scale is None else scale)
    check(recurrent.delta_rule(Q, KEYS, VALUES, beta, scale, STATE), expected)


def test_delta_rule_solves_a_triangular_system():
    # What is written at token t is beta_t times what is left of v_t after all that earlier tokens wrote.
    beta = strengths(B, T, H)
    products = np.einsum("bthk,bshk->bhts", KEYS, KEYS) * np.tri(T, k=-1)
    system = np.eye(T) + np.moveaxis(beta, 1, 2)[..., None] * products
    written = np.linalg.solve(system, np.moveaxis(beta[..., None] * VALUES, 1, 2))
    weights = np.einsum("bthk,bshk->bhts", Q, KEYS) * np.tri(T) * K**-0.5
    expected = np.moveaxis(weights @ written, 1, 2), np.einsum("bshk,bhsv->bhkv", KEYS, written)
    check(recurrent.delta_rule(Q, KEYS, VALUES, beta), expected)


def test_gated_delta_rule_solves_a_triangular_system():
    beta, g = strengths(B, T, H), decays(B, T, H)
    total = np.moveaxis(np.cumsum(g, axis=1), 1, 2)
    decay = np.exp(np.where(np.tri(T) > 0, total[..., :, None] - total[..., None, :], -np.inf))
    products = np.einsum("bthk,bshk->bhts", KEYS, KEYS) * decay * np.tri(T, k=-1)
    system = np.eye(T) + np.moveaxis(beta, 1, 2)[..., None] * products
    old = np.einsum("bthk,bhkv,bht->bhtv", KEYS, STATE, np.exp(total))
    left = np.moveaxis(beta, 1, 2)[..., None] * (np.moveaxis(VALUES, 1, 2) - old)
    written = np.linalg.solve(system, left)
    o = (np.einsum("bthk,bshk->bhts", Q, KEYS) * decay) @ written
    o = o + np.einsum("bthk,bhkv,bht->bhtv", Q, STATE, np.exp(total))
    final = np.einsum("bshk,bhsv,bhs->bhkv", KEYS, written, decay[..., -1, :])
    final = final + STATE * np.exp(total[..., -1])[..., None, None]
    found = recurrent.gated_delta_rule(Q, KEYS, VALUES, g, beta, None, STATE)
    check(found, (np.moveaxis(o, 1, 2) * K**-0.5, final))


def test_delta_rule_with_strength_one_stores_the_value():
    k = KEYS / np.linalg.norm(KEYS, axis=-1, keepdims=True)
    o, _ = recurrent.delta_rule(k, k, VALUES, None, 1.0, STATE)
    np.testing.assert_allclose(o, VALUES, rtol=1e-10, atol=1e-12)
    o, final = recurrent.delta_rule(k, k, VALUES, np.zeros((B, T, H)), 1.0, STATE)
    check((o, final), (np.einsum("bthk,bhkv->bthv", k, STATE), STATE))
    # Strength 2 reflects what the state holds for a key: a negative eigenvalue.
    o, _ = recurrent.delta_rule(k[:, :1], k[:, :1], 0 * VALUES[:, :1], np.full((B, 1, H), 2.0), 1.0, STATE)
    check((o,), (-np.einsum("bthk,bhkv->bthv", k[:, :1], STATE),))


def test_strengths_of_columns():
    beta, g = strengths(B, T, H, V), decays(B, T, H)
    for function, rest in [(recurrent.delta_rule, ()), (recurrent.gated_delta_rule, (g,))]:
        o, final = function(Q, KEYS, VALUES, *rest, beta, None, STATE)
        for j in range(V):
            column = slice(j, j + 1)
            alone = function(Q, KEYS, VALUES[..., column], *rest, beta[..., j], None, STATE[..., column])
            check((o[..., column], final[..., column]), alone)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_gated_delta_rule(scale):
    v, g, gk = numbers(B, T, HV, V), decays(B, T, HV), decays(B, T, HV, K)
    beta, state = strengths(B, T, HV), numbers(B, HV, K, V)
    q, k = grouped(Q), grouped(KEYS)
    writes = beta[..., None, None] * dyads(k, v)
    factor = K**-0.5 if scale is None else scale
    for given, total in [
        ({"g": g}, g[..., None] + 0 * gk),
        ({"gk": gk}, gk),
        ({"g": g, "gk": gk}, g[..., None] + gk),
        ({}, 0 * gk),
    ]:
        # The state decays first, and is reflected then.
        expected = unrolled(q, reflections(k, beta) @ diagonals(total), writes, state, factor)
        options = {"beta": beta, "scale": scale, "initial_state": state}
        check(recurrent.gated_delta_rule(Q, KEYS, v, **given, **options), expected)
    expected = unrolled(q, reflections(k, beta) @ diagonals(gk), writes, state, factor)
    check(recurrent.kda(Q, KEYS, v, gk, beta, scale, state), expected)


def test_decays_of_columns():
    g, gv, beta = decays(B, T, H), decays(B, T, H, V), strengths(B, T, H)
    o, final = recurrent.gated_delta_rule(Q, KEYS, VALUES, g, beta, None, STATE, gv=gv)
    for j in range(V):
        column = slice(j, j + 1)
        arguments = (Q, KEYS, VALUES[..., column], g + gv[..., j], beta, None, STATE[..., column])
        check((o[..., column], final[..., column]), recurrent.gated_delta_rule(*arguments))


def test_vectors_may_be_normalized_first():
    q, k = (np.array(x) for x in (Q, KEYS))
    q[0, 0], k[0, 1] = 1e-4, 0.0
    unit = [x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6) for x in (q, k)]
    beta, g, gk = strengths(B, T, H), decays(B, T, H), decays(B, T, H, K)
    two = [x.repeat(2, axis=1) for x in (k, VALUES, beta)]
    for function, rest in [
        (recurrent.delta_rule, (beta,)),
        (recurrent.gated_delta_rule, (g, beta)),
        (recurrent.kda, (gk, beta)),
    ]:
        found = function(q, k, VALUES, *rest, use_qk_l2norm_in_kernel=True)
        check(found, function(*unit, VALUES, *rest))
    found = recurrent.gated_delta_product(q, *two[:2], g, two[2], 2, use_qk_l2norm_in_kernel=True)
    check(found, recurrent.gated_delta_product(unit[0], unit[1].repeat(2, axis=1), two[1], g, two[2], 2))


def test_gates():
    g, rate, bias = numbers(B, T, H, K), numbers(H), numbers(H, K)
    softened, bounded = np.zeros(g.shape), np.zeros(g.shape)
    for b, t, h, j in np.ndindex(g.shape):
        x = g[b, t, h, j] + bias[h, j]
        softened[b, t, h, j] = -math.exp(rate[h]) * math.log(1 + math.exp(x))
        bounded[b, t, h, j] = -5 / (1 + math.exp(-math.exp(rate[h]) * x))
    kda = recurrent.kda_gate
    check((kda(g, rate, bias.ravel()),), (softened,))
    check((kda(g, rate.reshape(1, 1, H, 1), bias),), (softened,))
    check((kda(g + bias, rate),), (softened,))
    check((kda(g, rate, bias, -5.0),), (bounded,))
    check((kda(g, None, bias, -5.0),), (kda(g, 0 * rate, bias, -5.0),))
    with pytest.raises(ValueError, match="A_log is needed where there is no lower_bound"):
        kda(g)
    check((recurrent.gdn_gate(g[..., 0], rate, bias[:, 0]),), (softened[..., 0],))
    check((recurrent.gdn_gate(g[..., 0] + bias[:, 0], rate),), (softened[..., 0],))


def test_gates_of_extreme_numbers():
    g = np.array([-1e4, -40.0, 0.0, 40.0, 1e4])
    np.testing.assert_allclose(
        recurrent.gdn_gate(g[:, None], np.zeros(1))[:, 0], [0, -math.exp(-40), -math.log(2), -40, -1e4]
    )
    bounded = recurrent.kda_gate(g[:, None, None], lower_bound=-5.0).ravel()
    np.testing.assert_allclose(bounded, [0, -5 * math.exp(-40), -2.5, -5, -5])


def test_gates_in_the_rules():
    v, beta = numbers(B, T, HV, V), numbers(B, T, HV)
    rate, bias, raw = numbers(HV), numbers(HV, K), numbers(B, T, HV, K)
    sigmoid = 1 / (1 + np.exp(-beta))
    in_kernel = {"use_gate_in_kernel": True, "A_log": rate}
    expected = recurrent.kda(Q, KEYS, v, recurrent.kda_gate(raw, rate, bias), sigmoid)
    options = {"dt_bias": bias.ravel(), "use_beta_sigmoid_in_kernel": True}
    check(recurrent.kda(Q, KEYS, v, raw, beta, **in_kernel, **options), expected)
    expected = recurrent.kda(Q, KEYS, v, recurrent.kda_gate(raw, rate, None, -3.0), 2 * sigmoid)
    options = {"lower_bound": -3.0, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    check(recurrent.kda(Q, KEYS, v, raw, beta, **in_kernel, **options), expected)
    raw, bias = raw[..., 0], bias[:, 0]
    expected = recurrent.gated_delta_rule(Q, KEYS, v, recurrent.gdn_gate(raw, rate, bias), 2 * sigmoid)
    options = {"dt_bias": bias, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    check(recurrent.gated_delta_rule(Q, KEYS, v, raw, beta, **in_kernel, **options), expected)
    with pytest.raises(ValueError, match="use_gate_in_kernel needs g and A_log"):
        recurrent.gated_delta_rule(Q, KEYS, v, raw, beta, use_gate_in_kernel=True)


@pytest.mark.parametrize("gated", [False, True])
def test_gated_delta_product(gated):
    k, v, beta = numbers(B, T, N, H, K) / 2, numbers(B, T, N, H, V), strengths(B, T, N, H)
    g = decays(B, T, H)
    transitions = np.broadcast_to(np.exp(g * gated)[..., None, None] * np.eye(K), (B, T, H, K, K))
    writes = np.zeros((B, T, H, K, V))
    for j in range(N):
        reflection = reflections(k[:, :, j], beta[:, :, j])
        transitions = reflection @ transitions
        writes = reflection @ writes + beta[:, :, j, :, None, None] * dyads(k[:, :, j], v[:, :, j])
    expected = unrolled(Q, transitions, writes, STATE, K**-0.5)
    flat = [x.reshape(B, T * N, *x.shape[3:]) for x in (k, v, beta)]
    arguments = (Q, *flat[:2], g if gated else None, flat[2], N)
    check(recurrent.gated_delta_product(*arguments, None, STATE), expected)
    scaled = recurrent.gated_delta_product(*arguments, 2.0, STATE)
    check(scaled, (2 * K**0.5 * expected[0], expected[1]))


def test_one_reflection_is_the_gated_delta_rule():
    g, beta = decays(B, T, H), strengths(B, T, H)
    check(
        recurrent.gated_delta_product(Q, KEYS, VALUES, g, beta, 1),
        recurrent.gated_delta_rule(Q, KEYS, VALUES, g, beta),
    )


@pytest.mark.parametrize("scale", [None, -0.3])
def test_dplr_delta_rule(scale):
    a, b, gk = numbers(B, T, H, K) / 2, numbers(B, T, H, K) / 2, decays(B, T, H, K)
    factor = K**-0.5 if scale is None else scale
    expected = unrolled(Q, diagonals(gk) + dyads(b, a), dyads(KEYS, VALUES), STATE, factor)
    check(recurrent.dplr_delta_rule(Q, KEYS, VALUES, a, b, gk, scale, STATE), expected)
    check(recurrent.rwkv7(Q, gk, KEYS, VALUES, a, b, scale, STATE), expected)
    expected = unrolled(Q, np.eye(K) + dyads(b, a), dyads(KEYS, VALUES), STATE, factor)
    check(recurrent.iplr_delta_rule(Q, KEYS, VALUES, a, b, scale, STATE), expected)


def test_rwkv7_has_no_scale_unless_it_is_asked_for():
    a, b, w = numbers(B, T, H, K), numbers(B, T, H, K), decays(B, T, H, K)
    o, _ = recurrent.rwkv7(Q, w, KEYS, VALUES, a, b)
    check((o * K**-0.5,), recurrent.rwkv7(Q, w, KEYS, VALUES, a, b, None)[:1])


def test_delta_rule_is_a_low_rank_transition():
    beta = strengths(B, T, H)[..., None]
    check(
        recurrent.iplr_delta_rule(Q, KEYS, beta * VALUES, -beta * KEYS, KEYS, None, STATE),
        recurrent.delta_rule(Q, KEYS, VALUES, beta[..., 0], None, STATE),
    )


def test_kda_is_a_low_rank_transition_with_decay():
    # The rank-one part of KDA reads the decayed state: `a` carries the decay.
    beta, g = strengths(B, T, H)[..., None], decays(B, T, H, K)
    check(
        recurrent.dplr_delta_rule(Q, KEYS, beta * VALUES, -beta * KEYS * np.exp(g), KEYS, g, None, STATE),
        recurrent.kda(Q, KEYS, VALUES, g, beta[..., 0], None, STATE),
    )
