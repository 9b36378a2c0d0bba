"""Every form of every operator against the oracle: lengths, widths, dtypes, ways to work through tokens."""

from functools import cache

import numpy as np
import pytest

from subquad import ops

from .cases import (
    DTYPES,
    FAMILIES,
    FIRST,
    FORMS,
    GROUPED,
    HALF,
    Sizes,
    about,
    call,
    check,
    draw_inputs,
    draw_states,
    expect,
    problem,
    solve,
)
from .composed import FORMS as COMPOSED

LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 100)
# Of keys and of values.
WIDTHS = ((1, 8), (8, 1), (20, 64), (64, 20), (100, 128), (128, 100), (64, 128), (33, 17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_lengths(form, dtype):
    for length in LENGTHS:
        solve(form, Sizes(tokens=length), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_long_sequence(form, dtype):
    solve(form, Sizes(batch=1, tokens=1000), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FIRST)
def test_ways(family, dtype, way):
    for length in (1, 3, 40, 100):
        solve(FIRST[family], Sizes(tokens=length, heads=1, value_heads=1), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("family", FIRST)
def test_widths(family, dtype):
    for widths in WIDTHS:
        for length in (3, 50):
            solve(FIRST[family], Sizes(1, length, 2, 2, *widths), dtype)


@pytest.mark.parametrize("family", FIRST)
def test_widths_in_all_ways(family, way):
    for widths in ((1, 1), (20, 64), (128, 100)):
        solve(FIRST[family], Sizes(1, 35, 1, 1, *widths), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.family in GROUPED])
def test_heads_that_share_keys(form, dtype):
    for heads in ((1, 1), (1, 4), (2, 6), (3, 3)):
        for length in (2, 65):
            solve(form, Sizes(1, length, *heads, 20, 8), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_gates_may_be_float32(form, dtype):
    for length in (2, 65):
        solve(form, Sizes(tokens=length), dtype, beside="float32")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].has_state])
def test_states_may_be_of_half_types(form, dtype):
    family = FORMS[form].family
    sizes = Sizes(tokens=20)
    inputs = draw_inputs(family, sizes, dtype)
    states = tuple(x.astype(DTYPES[dtype]) for x in draw_states(family, sizes, dtype))
    check(call(form, inputs, states), expect(family, inputs, states), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].family != "rwkv7 scaled"])
def test_scale(form, dtype):
    family = FORMS[form].family
    given = problem(family, Sizes(), dtype, has_state=False)
    for scale in (1.0, -0.3) if family == "normalized" else (0.0, 1.0, -0.3):
        with about(scale):
            check(call(form, given.inputs, scale=scale), expected(family, dtype, scale), dtype)


@cache
def expected(family, dtype, scale):
    return expect(family, problem(family, Sizes(), dtype, has_state=False).inputs, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].has_state])
def test_zeros_are_the_default_state(form, dtype):
    family = FORMS[form].family
    given = problem(family, Sizes(), dtype, has_state=False)
    check(call(form, given.inputs), given.expected, dtype)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(
    "form", [name for name, form in FORMS.items() if FAMILIES[form.family].is_delta and form.has_state]
)
def test_lengths_of_queries_and_keys(form, dtype):
    family = FORMS[form].family
    inputs = draw_inputs(family, Sizes(tokens=40), dtype)
    for name in ("q", "k"):
        inputs[name] = (3.0 * inputs[name].astype(np.float64)).astype(inputs[name].dtype)
    inputs["k"][:, 3] = 0
    option = {"use_qk_l2norm_in_kernel": True}
    check(call(form, inputs, **option), expect(family, inputs, **option), dtype)


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].has_state])
def test_states_are_returned_where_they_are_asked_for(form):
    given = problem(FORMS[form].family, Sizes(), "float32", has_state=False)
    o, states = call(form, given.inputs, output_final_state=False)
    assert states == ()
    np.testing.assert_array_equal(o, call(form, given.inputs)[0])


def test_every_operator_is_tried():
    same = {"chunk_gdn", "fused_recurrent_gdn"}
    gates = {"fused_additive_gate", "fused_gdn_gate", "fused_kda_gate"}
    convolutions = {"causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update"}
    norms = {"rms_norm_gated"}
    scans = {"chunk_hgrn", "fused_recurrent_hgrn", "selective_scan_fn", "selective_state_update"}
    around = {function for function, _ in COMPOSED.values()} | convolutions | scans
    assert {form.function for form in FORMS.values()} | around | same | gates | norms == set(ops.__all__)
    assert ops.chunk_gdn is ops.chunk_gated_delta_rule
    assert ops.fused_recurrent_gdn is ops.fused_recurrent_gated_delta_rule
