"""Numbers at their limits: gates that keep all or nothing, keys that are reflected, inputs of large norm, infinities."""

from functools import cache

import numpy as np
import pytest

from .cases import (
    DTYPES,
    FAMILIES,
    FIRST,
    FORMS,
    HALF,
    PRODUCT,
    Problem,
    Sizes,
    about,
    assert_largest_close,
    call,
    check,
    draw_inputs,
    draw_states,
    expect,
)

GATES = {
    "simple_gla": "g",
    "gla": "gk",
    "rwkv6": "w",
    "gated_delta_rule": "g",
    "kda": "g",
    "gated_delta_product": "g",
    "dplr": "gk",
    "rwkv7": "w",
}
STRENGTHS = ("delta_rule", "gated_delta_rule", "kda", "gated_delta_product")
SIZES = Sizes(batch=1, tokens=100)


def of_all_sizes(generator, shape):
    return -(10.0 ** generator.uniform(-6, np.log10(30), shape))


def infinite(share):
    return lambda generator, shape: np.where(
        generator.random(shape) < share, -np.inf, of_all_sizes(generator, shape)
    )


def every(distance, gate, other):
    """One gate at tokens of that distance, another between them."""

    def fill(generator, shape):
        gates = np.full(shape, other)
        gates[:, ::distance] = gate
        return gates

    return fill


def strong_after_weak(generator, shape):
    gates = np.full(shape, -1e-6)
    gates[:, shape[1] // 2 :] = -30.0
    return gates


def by_channel(generator, shape):
    return np.broadcast_to(-np.geomspace(1e-6, 30, shape[-1]), shape)


# How log decays are filled.
KINDS = {
    **{str(gate): every(1, gate, gate) for gate in (0.0, -1e-6, -1.0, -6.0, -30.0, -np.inf)},
    "of all sizes": of_all_sizes,
    "mostly -inf": infinite(0.7),
    "sometimes -inf": infinite(0.05),
    "tokens of -inf": every(9, -np.inf, -0.01),
    "some strong": every(7, -200.0, -1e-3),
    "strong after weak": strong_after_weak,
    "by channel": by_channel,
}


@cache
def filled(family, kind, dtype):
    """A call with gates of that kind, and what the oracle says; the same for all ways."""
    inputs = draw_inputs(family, SIZES, dtype)
    name = GATES[family]
    gates = KINDS[kind](np.random.default_rng(7), inputs[name].shape)
    inputs[name] = gates.astype(DTYPES[dtype])
    states = draw_states(family, SIZES, dtype)
    return Problem(inputs, states, expect(family, inputs, states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", GATES)
def test_gates(family, dtype, way):
    for kind in KINDS:
        given = filled(family, kind, dtype)
        with about(kind):
            check(call(FIRST[family], given.inputs, given.states), given.expected, dtype)


@pytest.mark.parametrize(("keys", "values"), [(1100, 5), (5, 1100)])
@pytest.mark.parametrize("family", FIRST)
def test_wide_heads(family, keys, values, way):
    sizes = Sizes(1, 20, 1, 1, keys, values)
    inputs, states = draw_inputs(family, sizes, "float64"), draw_states(family, sizes, "float64")
    check(call(FIRST[family], inputs, states), expect(family, inputs, states), "float64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constants", [(0.0, -np.inf), (-30.0, -1e-6), (-1e5, -200.0)], ids=str)
def test_constant_gates(constants, dtype, way):
    inputs = draw_inputs("constant", SIZES, dtype)
    inputs["g_gamma"] = np.array(constants)
    states = draw_states("constant", SIZES, dtype)
    check(call(FIRST["constant"], inputs, states), expect("constant", inputs, states), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", STRENGTHS)
def test_strengths(family, dtype, way):
    for beta in (0.0, 1.0, 2.0, "any"):
        given = strong(family, beta, dtype)
        found = call(FIRST[family], given.inputs, given.states)
        with about(beta):
            check(found, given.expected, dtype)
        if beta == 0.0 and family == "delta_rule":
            np.testing.assert_array_equal(found[1][0], given.states[0])


@cache
def strong(family, beta, dtype):
    """A call that writes that strongly, and what the oracle says."""
    inputs = draw_inputs(family, SIZES, dtype)
    shape = inputs["beta"].shape
    drawn = np.random.default_rng(3).choice([0.0, 0.5, 1.0, 2.0], shape)
    inputs["beta"] = (drawn if beta == "any" else np.full(shape, beta)).astype(DTYPES[dtype])
    if "g" in inputs:
        # Where nothing is written, something of the first state should be left.
        inputs["g"] = (0.02 * inputs["g"].astype(np.float64)).astype(DTYPES[dtype])
    states = draw_states(family, SIZES, dtype)
    return Problem(inputs, states, expect(family, inputs, states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.family == "delta_rule"])
def test_strength_is_1_by_default(form, dtype):
    inputs = draw_inputs("delta_rule", SIZES, dtype)
    inputs["beta"] = np.ones_like(inputs["beta"])
    wanted = expect("delta_rule", inputs)
    inputs["beta"] = None
    check(call(form, inputs), wanted, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", [family for family in FIRST if family != "normalized"])
def test_inputs_of_large_norm(family, dtype, way):
    sizes = Sizes(batch=1, tokens=70, keys=64, values=32)
    inputs = draw_inputs(family, sizes, dtype)
    # Keys that are corrected by and keys of transitions must not be longer than 1: those are normalised, these left.
    for name in {"q", "r", "k", "v"} & set(inputs):
        inputs[name] = (300.0 * inputs[name].astype(np.float64)).astype(DTYPES[dtype])
    option = {"use_qk_l2norm_in_kernel": True} if FAMILIES[family].is_delta else {}
    check(call(FIRST[family], inputs, **option), expect(family, inputs, **option), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", FIRST)
def test_the_future_has_no_influence(family, dtype, way):
    inputs = draw_inputs(family, SIZES, dtype)
    other = draw_inputs(family, SIZES, dtype, seed=5)
    clean, _ = call(FIRST[family], inputs)
    for name in set(inputs) - {"u", "g_gamma"}:
        first = 50 * (PRODUCT if name in FAMILIES[family].repeated else 1)
        inputs[name] = np.concatenate([inputs[name][:, :first], other[name][:, first:]], axis=1)
    found, _ = call(FIRST[family], inputs)
    assert_largest_close(found[:, :50], clean[:, :50].astype(np.float64), dtype, "o")
    assert (found[:, 50:] != clean[:, 50:]).any(axis=-1).all()


@pytest.mark.parametrize("family", FIRST)
def test_nan_does_not_reach_the_past(family, way):
    inputs = draw_inputs(family, SIZES, "float32")
    clean, _ = call(FIRST[family], inputs)
    inputs["v"] = inputs["v"].copy()
    inputs["v"][:, 50 * (PRODUCT if "v" in FAMILIES[family].repeated else 1) :] = np.nan
    found, (final, *_) = call(FIRST[family], inputs)
    np.testing.assert_array_equal(found[:, :50], clean[:, :50])
    assert np.isnan(found[:, 50:]).all()
    assert np.isnan(final).all()


@pytest.mark.parametrize("family", FIRST)
def test_heads_and_rows_are_apart(family, way):
    sizes = Sizes(batch=2, tokens=40)
    inputs, states = draw_inputs(family, sizes, "float32"), draw_states(family, sizes, "float32")
    clean = call(FIRST[family], inputs, states)
    queries = FAMILIES[family].queries
    for name in (queries, "k", "v"):
        inputs[name] = inputs[name].copy()
        inputs[name][1, :, 1] = np.nan
    found = call(FIRST[family], inputs, states)
    np.testing.assert_array_equal(found[0][:, :, 0], clean[0][:, :, 0])
    np.testing.assert_array_equal(found[0][0], clean[0][0])
    assert np.isnan(found[0][1, :, 1]).all()


@pytest.mark.parametrize("dtype", HALF)
def test_normalised_sums_do_not_overflow(dtype):
    # Beyond what float16 can say, until they are divided.
    inputs = draw_inputs("normalized", Sizes(batch=1, tokens=500), dtype)
    for name in ("q", "k"):
        inputs[name] = (10.0 * inputs[name].astype(np.float64)).astype(DTYPES[dtype])
    inputs["v"] = (50.0 * inputs["v"].astype(np.float64)).astype(DTYPES[dtype])
    check(call(FIRST["normalized"], inputs), expect("normalized", inputs), dtype)
