"""Decaying states against sums over pairs of tokens: attention whose weights are products of decays."""

import math

import numpy as np
import pytest

from subquad.reference import recurrent

B, T, H, K, V, M = 2, 6, 3, 4, 5, 3
GENERATOR = np.random.default_rng(3)


def numbers(*shape):
    return GENERATOR.standard_normal(shape)


def decays(*shape):
    return -np.exp(numbers(*shape))


Q, KEYS, VALUES = numbers(B, T, H, K), numbers(B, T, H, K), numbers(B, T, H, V)
STATE = numbers(B, H, K, V)


def spans(g):
    """Sums of `g` `[B, T, ...]` over the tokens after `s` up to `t`, `[B, t, s, ...]`, `-inf` where `s > t`, and from the start."""
    total = np.zeros((B, T, T, *g.shape[2:]))
    for t, s in np.ndindex(T, T):
        total[:, t, s] = g[:, s + 1 : t + 1].sum(axis=1) if s <= t else -np.inf
    return total, np.stack([g[:, : t + 1].sum(axis=1) for t in range(T)], axis=1)


def pairs(q, k, v, g, state, scale):
    """Output and final state of decays `g` that broadcast to `[B, T, H, K, V]`."""
    within, before = (np.exp(x) for x in spans(np.broadcast_to(g, (B, T, H, K, V))))
    o = np.einsum("bthk,bshk,bshv,btshkv->bthv", q, k, v, within)
    o += np.einsum("bthk,bhkv,bthkv->bthv", q, state, before)
    final = np.einsum("bshk,bshv,bshkv->bhkv", k, v, within[:, -1]) + state * before[:, -1]
    return scale * o, final


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [None, -0.3])
def test_linear_attn_is_causal_attention_without_softmax(scale):
    o, final = recurrent.linear_attn(Q, KEYS, VALUES, scale, normalize=False)
    weights = np.einsum("bthk,bshk->bhts", Q, KEYS) * np.tri(T) * (K**-0.5 if scale is None else scale)
    check(
        (o, final),
        (np.einsum("bhts,bshv->bthv", weights, VALUES), np.einsum("bshk,bshv->bhkv", KEYS, VALUES)),
    )
    check(
        recurrent.linear_attn(Q, KEYS, VALUES, scale, STATE, normalize=False),
        pairs(Q, KEYS, VALUES, np.zeros(1), STATE, K**-0.5 if scale is None else scale),
    )


def test_normalized_linear_attn_is_a_weighted_average():
    q, k, z = np.abs(Q), np.abs(KEYS), np.abs(numbers(B, 1, H, K))
    weights = np.einsum("bthk,bshk->bhts", q, k) * np.tri(T)
    offset = 1e-10 / 0.5
    averages = np.einsum("bhts,bshv->bthv", weights / (weights.sum(axis=-1, keepdims=True) + offset), VALUES)
    o, (final, final_z) = recurrent.linear_attn(q, k, VALUES, 0.5, normalize=True)
    check(
        (o, final, final_z),
        (averages, np.einsum("bshk,bshv->bhkv", k, VALUES), k.sum(axis=1, keepdims=True)),
    )
    # All values 1: so is every average, but for the offset.
    ones = recurrent.linear_attn(q, k, np.ones_like(VALUES), normalize=True)[0]
    np.testing.assert_allclose(ones, 1, rtol=1e-8)
    weights = np.einsum("bthk,bshk->bths", q, k) * np.tri(T)[:, None]
    above = np.einsum("bths,bshv->bthv", weights, VALUES) + np.einsum("bthk,bhkv->bthv", q, STATE)
    below = weights.sum(axis=-1) + np.einsum("bthk,bohk->bth", q, z)
    o, (_, final_z) = recurrent.linear_attn(q, k, VALUES, 0.5, (STATE, z), normalize=True)
    check((o, final_z), (above / (below + offset)[..., None], z + k.sum(axis=1, keepdims=True)))
    only_state = recurrent.linear_attn(q, k, VALUES, 0.5, STATE, normalize=True)[0]
    check((only_state,), recurrent.linear_attn(q, k, VALUES, 0.5, (STATE, 0 * z), normalize=True)[:1])


@pytest.mark.parametrize("has_g", [False, True])
@pytest.mark.parametrize("has_gamma", [False, True])
def test_simple_gla(has_g, has_gamma):
    g, g_gamma = decays(B, T, H), decays(H)
    total = g * has_g + g_gamma * has_gamma
    given = (g if has_g else None, g_gamma if has_gamma else None)
    check(
        recurrent.simple_gla(Q, KEYS, VALUES, *given, None, STATE),
        pairs(Q, KEYS, VALUES, np.broadcast_to(total, (B, T, H))[..., None, None], STATE, K**-0.5),
    )


def test_retention_decays_by_powers_of_two():
    ages = np.arange(T)[:, None] - np.arange(T)
    rates = np.array([1 - 2.0 ** -(5 + h) for h in range(H)])
    decay = np.where(ages >= 0, rates[:, None, None] ** np.maximum(ages, 0), 0)
    weights = np.einsum("bthk,bshk->bhts", Q, KEYS) * decay * K**-0.5
    final = np.einsum("bshk,bshv,hs->bhkv", KEYS, VALUES, decay[:, -1])
    check(recurrent.retention(Q, KEYS, VALUES), (np.einsum("bhts,bshv->bthv", weights, VALUES), final))


def test_lightning_attn_decays_by_head_and_layer():
    ages = np.maximum(np.arange(T)[:, None] - np.arange(T), 0)
    for layer, layers in [(0, 4), (3, 4)]:
        rates = np.array([math.exp(-(8 * h / H) * (1 - layer / layers)) for h in range(H)])
        decay = rates[:, None, None] ** ages * np.tri(T)
        weights = np.einsum("bthk,bshk->bhts", Q, KEYS) * decay * K**-0.5
        o, _ = recurrent.lightning_attn(Q, KEYS, VALUES, layer, layers)
        check((o,), (np.einsum("bhts,bshv->bthv", weights, VALUES),))


@pytest.mark.parametrize("has_gk", [False, True])
@pytest.mark.parametrize("has_gv", [False, True])
def test_gla(has_gk, has_gv):
    gk, gv = decays(B, T, H, K), decays(B, T, H, V)
    total = gk[..., None] * has_gk + gv[..., None, :] * has_gv
    given = (gk if has_gk else None, gv if has_gv else None)
    check(recurrent.gla(Q, KEYS, VALUES, *given, 0.7, STATE), pairs(Q, KEYS, VALUES, total, STATE, 0.7))


def test_decays_multiply_before_what_is_added():
    # One channel, by hand: S_1 = e^g S_0 + k v, and the first token is read with its own decay of the state.
    one = np.ones((1, 1, 1, 1))
    o, final = recurrent.gla(one, 2 * one, 3 * one, np.log(one / 4), None, 1.0, 8 * one)
    assert o.item() == final.item() == 8 / 4 + 2 * 3


@pytest.mark.parametrize("scale", [None, 2.0])
def test_rwkv6_reads_the_state_before_its_token(scale):
    w, u = decays(B, T, H, K), numbers(H, K)
    factor = K**-0.5 if scale is None else scale
    within, before = spans(w)
    # The decay of the token itself comes after its output.
    past = np.exp(within - w[:, :, None]) * np.tri(T, k=-1)[:, :, None, None]
    o = np.einsum("bthk,bshk,bshv,btshk->bthv", Q, KEYS, VALUES, past)
    o += np.einsum("bthk,hk,bthk,bthv->bthv", Q, u, KEYS, VALUES)
    o += np.einsum("bthk,bhkv,bthk->bthv", Q, STATE, np.exp(before - w))
    final = pairs(Q, KEYS, VALUES, w[..., None], STATE, 1)[1]
    check(recurrent.rwkv6(Q, KEYS, VALUES, w, u, scale, STATE), (factor * o, final))


def test_gateloop_multiplies_complex_numbers():
    a = np.exp(0.3 * decays(B, T, H, K) + 1j * numbers(B, T, H, K))
    state = STATE + 1j * numbers(B, H, K, V)
    products = np.zeros((B, T, T, H, K), complex)
    for t, s in np.ndindex(T, T):
        products[:, t, s] = np.prod(a[:, s + 1 : t + 1], axis=1) if s <= t else 0
    start = np.stack([np.prod(a[:, : t + 1], axis=1) for t in range(T)], axis=1)
    o = np.einsum("bthk,bshk,bshv,btshk->bthv", Q, KEYS, VALUES, products)
    o += np.einsum("bthk,bhkv,bthk->bthv", Q, state, start)
    final = np.einsum("bshk,bshv,bshk->bhkv", KEYS, VALUES, products[:, -1]) + state * start[:, -1, ..., None]
    found = recurrent.gateloop(Q, KEYS, VALUES, a, initial_state=state)
    assert found[1].dtype == np.complex128
    check(found, (o.real, final))
    check(recurrent.gateloop(Q, KEYS, VALUES, a, -2.0, state), (-2 * o.real, final))


def test_real_gateloop_is_gla():
    g = decays(B, T, H, K)
    o, final = recurrent.gateloop(Q, KEYS, VALUES, np.exp(g) + 0j, 0.5)
    check((o, final.real), recurrent.gla(Q, KEYS, VALUES, g, scale=0.5))
    assert (final.imag == 0).all()


def test_hgrn():
    x, g, h = numbers(B, T, M), decays(B, T, M), numbers(B, M)
    within, before = spans(g)
    o = np.einsum("bsm,btsm->btm", x, np.exp(within)) + h[:, None] * np.exp(before)
    check(recurrent.hgrn(x, g, h), (o, o[:, -1]))


def softmax(x):
    weights = np.exp(x)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("scale", [None, 0.4])
def test_gsa_is_softmax_attention_to_slots(scale):
    s, g = numbers(B, T, H, M), decays(B, T, H, M)
    hk, hv = numbers(B, H, K, M), numbers(B, H, M, V)
    within, before = (np.exp(x) for x in spans(g))
    slot_keys = np.einsum("bshk,bshm,btshm->bthkm", KEYS, s, within) + hk[:, None] * before[..., None, :]
    slot_values = np.einsum("bshm,bshv,btshm->bthmv", s, VALUES, within) + hv[:, None] * before[..., None]
    weights = softmax(np.einsum("bthk,bthkm->bthm", Q, slot_keys) * (K**-0.5 if scale is None else scale))
    o, final = recurrent.gsa(Q, KEYS, VALUES, s, g, scale, (hk, hv))
    check(
        (o, *final),
        (np.einsum("bthm,bthmv->bthv", weights, slot_values), slot_keys[:, -1], slot_values[:, -1]),
    )


def test_slots_without_decay_are_averages():
    s = 3 * numbers(B, T, H, M)
    weights = np.exp(np.einsum("bshm->bhms", s))[:, None] * np.tri(T)[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    slot_keys = np.einsum("bthms,bshk->bthkm", weights, KEYS)
    slot_values = np.einsum("bthms,bshv->bthmv", weights, VALUES)
    attention = softmax(np.einsum("bthk,bthkm->bthm", Q, slot_keys) * K**-0.5)
    o, final = recurrent.gsa(Q, KEYS, VALUES, s)
    check(
        (o, *final),
        (np.einsum("bthm,bthmv->bthv", attention, slot_values), slot_keys[:, -1], slot_values[:, -1]),
    )


@pytest.mark.parametrize("scale", [None, -0.3])
def test_lightnet_averages_values_by_a_softmax_over_tokens(scale):
    q, k, v = Q, KEYS, VALUES
    o, (final, z) = recurrent.lightnet(q, k, v, scale)
    weights = np.exp(k)[:, None] * np.tri(T)[:, :, None, None]
    weights /= weights.sum(axis=2, keepdims=True)
    states = np.einsum("btshk,bshv->bthkv", weights, v)
    check(
        (o, final, z),
        (
            np.einsum("bthk,bthkv->bthv", q, states) * (K**-0.5 if scale is None else scale),
            states[:, -1],
            np.log(np.exp(k).sum(axis=1, keepdims=True)),
        ),
    )


def test_lightnet_weighs_its_state_by_its_sums():
    sums = numbers(B, 1, H, K)
    o, (final, z) = recurrent.lightnet(Q, KEYS, VALUES, 1.0, (STATE, sums))
    total = np.exp(KEYS).sum(axis=1) + np.exp(sums[:, 0])
    expected = np.exp(sums[:, 0])[..., None] * STATE + np.einsum("bshk,bshv->bhkv", np.exp(KEYS), VALUES)
    expected /= total[..., None]
    check((final, z), (expected, np.log(total)[:, None]))
    turned = recurrent.lightnet(Q, KEYS, VALUES, 1.0, (STATE.swapaxes(-1, -2), sums), state_v_first=True)
    check((turned[0], turned[1][0].swapaxes(-1, -2)), (o, final))


def test_slots_without_decay_begin_with_the_state():
    # The state counts as much as the first token alone.
    s, hk, hv = numbers(B, T, H, M), numbers(B, H, K, M), numbers(B, H, M, V)
    weights = np.exp(s)
    total = np.cumsum(weights, axis=1)
    share = weights[:, :1] / total
    slot_keys = np.cumsum(np.einsum("bshm,bshk->bshkm", weights, KEYS), axis=1) / total[..., None, :]
    slot_keys = slot_keys + share[..., None, :] * hk[:, None]
    slot_values = np.cumsum(np.einsum("bshm,bshv->bshmv", weights, VALUES), axis=1) / total[..., None]
    slot_values = slot_values + share[..., None] * hv[:, None]
    attention = softmax(np.einsum("bthk,bthkm->bthm", Q, slot_keys) * K**-0.5)
    o, final = recurrent.gsa(Q, KEYS, VALUES, s, None, None, (hk, hv))
    check(
        (o, *final),
        (np.einsum("bthm,bthmv->bthv", attention, slot_values), slot_keys[:, -1], slot_values[:, -1]),
    )


def test_slots_of_keys_serve_groups_of_queries():
    s, g, q = numbers(B, T, H, M), decays(B, T, H, M), numbers(B, T, 2 * H, K)
    hk, hv = numbers(B, H, K, M), numbers(B, H, M, V)
    for gate, state in [(g, (hk, hv)), (g, None), (None, None)]:
        o, final = recurrent.gsa(q, KEYS, VALUES, s, gate, None, state)
        for j in (0, 1):
            alone, other = recurrent.gsa(q[:, :, j::2], KEYS, VALUES, s, gate, None, state)
            check((o[:, :, j::2], *final), (alone, *other))
