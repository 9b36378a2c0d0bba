"""Composed operators against the oracles: lengths, widths, dtypes, libraries, groups of heads, ways to work through tokens."""

import numpy as np
import pytest
import torch

from .cases import DTYPES, HALF, Sizes, about, assert_same_bits
from .composed import (
    FAMILIES,
    FIRST,
    FORMS,
    call,
    check_found,
    draw_inputs,
    draw_states,
    expect,
    problem,
    solve,
)

LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 100)
# Of keys and of values.
WIDTHS = ((1, 8), (8, 1), (20, 64), (64, 20), (128, 33), (33, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_lengths(form, dtype):
    for length in LENGTHS:
        solve(form, Sizes(tokens=length), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FIRST.values())
def test_a_long_sequence(form, dtype):
    solve(form, Sizes(batch=1, tokens=1000), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FIRST.values())
def test_ways(form, dtype, way):
    for length in (1, 3, 40, 100):
        solve(form, Sizes(tokens=length), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("form", FIRST.values())
def test_widths(form, dtype):
    for widths in WIDTHS:
        for length in (3, 50):
            solve(form, Sizes(1, length, 2, 2, *widths), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [name for name, (_, family) in FORMS.items() if FAMILIES[family].is_grouped])
def test_heads_that_share_keys(form, dtype):
    for heads in ((1, 1), (1, 4), (2, 6), (3, 3)):
        for length in (2, 65):
            solve(form, Sizes(1, length, *heads, 20, 8), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FIRST.values())
def test_gates_may_be_float32(form, dtype):
    family = FORMS[form][1]
    for length in (2, 65):
        inputs = draw_inputs(family, Sizes(tokens=length), dtype, beside="float32")
        check_found(call(form, inputs), expect(family, inputs), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", [name for name in FIRST.values() if "gate_loop" not in name])
def test_states_may_be_of_half_types(form, dtype):
    family, sizes = FORMS[form][1], Sizes(tokens=20)
    inputs = draw_inputs(family, sizes, dtype)
    states = tuple(x.astype(DTYPES[dtype]) for x in draw_states(family, sizes, dtype))
    check_found(call(form, inputs, states), expect(family, inputs, states), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_zeros_are_the_default_state(form, dtype):
    given = problem(FORMS[form][1], Sizes(), dtype, has_state=False)
    check_found(call(form, given.inputs), given.expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [name for name in FORMS if "gsa" in name or "gate_loop" in name])
def test_scale(form, dtype):
    family = FORMS[form][1]
    given = problem(family, Sizes(), dtype, has_state=False)
    for scale in (0.0, 1.0, -0.3):
        with about(scale):
            found = call(form, given.inputs, scale=scale)
            check_found(found, expect(family, given.inputs, scale=scale), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_states_are_returned_where_they_are_asked_for(form):
    given = problem(FORMS[form][1], Sizes(), "float32", has_state=False)
    name = "return_last_states" if "mlstm" in form else "output_final_state"
    o, states = call(form, given.inputs, **{name: False})
    assert all(state is None for state in states)
    np.testing.assert_array_equal(o, call(form, given.inputs)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_torch_is_numpy(form, dtype, convert_all):
    for length in (0, 1, 37):
        given = problem(FORMS[form][1], Sizes(tokens=length), dtype)
        found = call(form, convert_all("torch", given.inputs), convert_all("torch", given.states))
        assert all(isinstance(x, torch.Tensor) for x in (found[0], *found[1]))
        with about(length):
            check_found(found, given.expected, dtype)


@pytest.mark.parametrize("form", FIRST.values())
def test_jax_is_numpy(form, convert_all):
    given = problem(FORMS[form][1], Sizes(tokens=37), "float32")
    found = call(form, convert_all("jax", given.inputs), convert_all("jax", given.states))
    assert type(found[0]) is type(convert_all("jax", (np.zeros(1),))[0])
    check_found((np.asarray(found[0]), tuple(np.asarray(x) for x in found[1])), given.expected, "float32")


@pytest.mark.parametrize("form", FIRST.values())
def test_layouts(form):
    given = problem(FORMS[form][1], Sizes(tokens=37), "float32")
    expected = call(form, given.inputs, given.states)

    def apart(x):
        """Tokens first in memory, in the middle of something larger."""
        if x.ndim < 3:
            return x[::-1].copy()[::-1]
        whole = np.full((x.shape[1], x.shape[0], *x.shape[2:-1], x.shape[-1] + 2), np.nan, x.dtype)
        whole[..., 1:-1] = x.swapaxes(0, 1)
        return whole.swapaxes(0, 1)[..., 1:-1]

    inputs = {name: apart(x) for name, x in given.inputs.items()}
    assert_same_bits(call(form, inputs, tuple(apart(x) for x in given.states)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_states_are_left_alone(form):
    given = problem(FORMS[form][1], Sizes(tokens=5), "float32")
    states = tuple(x.copy() for x in given.states)
    _, finals = call(form, given.inputs, states)
    for state, before, final in zip(states, given.states, finals, strict=True):
        np.testing.assert_array_equal(state, before)
        assert not np.shares_memory(state, final)
        assert final.flags.c_contiguous
