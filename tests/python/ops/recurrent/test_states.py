"""States from one call to the next, of packed sequences, in either order, in place."""

import numpy as np
import pytest
import torch

from subquad import ops

from .cases import (
    DTYPES,
    FAMILIES,
    FORMS,
    Sizes,
    about,
    accumulator,
    assert_same_bits,
    bounds_of,
    call,
    check,
    draw_inputs,
    draw_states,
    expect,
    part,
    problem,
    spans,
)

WITH_STATES = [name for name, form in FORMS.items() if form.has_state]
PACKABLE = [name for name in FORMS if "parallel_delta_rule" not in name]
LENGTHS = {
    "some empty": (0, 5, 0, 64, 1, 33, 0),
    "all empty": (0, 0),
    "one": (40,),
    "equal": (16, 16, 16),
    "none": (),
}
V_FIRST = [
    name
    for name, form in FORMS.items()
    if form.function
    in {
        "chunk_simple_gla",
        "fused_recurrent_simple_gla",
        "fused_recurrent_retention",
        "chunk_gla",
        "fused_recurrent_gla",
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "chunk_kda",
        "fused_recurrent_kda",
    }
]
IN_PLACE = [name for name in FORMS if name.startswith(("fused_recurrent_gated", "fused_recurrent_kda"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", WITH_STATES)
def test_two_parts_are_the_whole(form, dtype):
    family = FORMS[form].family
    given = problem(family, Sizes(tokens=100), dtype)
    for cut in (0, 1, 33, 64, 99, 100):
        first, states = call(form, part(family, given.inputs, 0, cut), given.states)
        second, states = call(form, part(family, given.inputs, cut, 100), states)
        with about(cut):
            check((np.concatenate([first, second], axis=1), states), given.expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", WITH_STATES)
def test_token_by_token(form, dtype):
    family = FORMS[form].family
    given = problem(family, Sizes(tokens=17), dtype)
    states, outputs = given.states, []
    for t in range(17):
        o, states = call(form, part(family, given.inputs, t, t + 1), states)
        outputs.append(o)
    check((np.concatenate(outputs, axis=1), states), given.expected, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("form", PACKABLE)
def test_packed_sequences_are_separate_calls(form, dtype):
    for name, lengths in LENGTHS.items():
        for kind in (np.int32, np.int64):
            with about(name, kind):
                check_packed(form, lengths, dtype, kind)


def check_packed(form, lengths, dtype, kind):
    named = FORMS[form]
    sizes = Sizes(batch=1, tokens=sum(lengths))
    inputs = draw_inputs(named.family, sizes, dtype)
    states = draw_states(named.family, sizes, dtype, sequences=len(lengths)) if named.has_state else None
    found = call(form, inputs, states, cu_seqlens=bounds_of(lengths).astype(kind))
    assert found[0].shape == (1, sum(lengths), 2, 8)
    parts = []
    for n, span in enumerate(spans(lengths)):
        one = None if states is None else tuple(x[n : n + 1] for x in states)
        parts.append(call(form, part(named.family, inputs, *span), one))
    if parts:
        finals = tuple(np.concatenate(x) for x in zip(*(part[1] for part in parts), strict=True))
        assert_same_bits(found, (np.concatenate([part[0] for part in parts], axis=1), finals))
    for x, y in zip(found[1], states or (), strict=True):
        for n, length in enumerate(lengths):
            if length == 0:
                np.testing.assert_array_equal(x[n], y[n])


@pytest.mark.parametrize("form", PACKABLE)
def test_packed_sequences(form):
    named = FORMS[form]
    lengths = LENGTHS["some empty"]
    sizes = Sizes(batch=1, tokens=sum(lengths))
    inputs = draw_inputs(named.family, sizes, "float32")
    states = draw_states(named.family, sizes, "float32", sequences=len(lengths)) if named.has_state else None
    option = {"cu_seqlens": bounds_of(lengths)}
    check(call(form, inputs, states, **option), expect(named.family, inputs, states, **option), "float32")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("form", V_FIRST)
def test_states_of_values_first(form, dtype, way):
    given = problem(FORMS[form].family, Sizes(tokens=35), dtype)
    (state,) = given.states
    expected = call(form, given.inputs, given.states)
    # Contiguous, and as a view that is not.
    for turned in (np.ascontiguousarray(state.swapaxes(-1, -2)), state.swapaxes(-1, -2)):
        o, (final,) = call(form, given.inputs, (turned,), state_v_first=True)
        assert final.shape == turned.shape
        assert_same_bits((o, (final.swapaxes(-1, -2),)), expected)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", IN_PLACE)
def test_in_place(form, dtype, v_first, library, convert, convert_all):
    family = FORMS[form].family
    option = {"state_v_first": v_first}
    for tokens, values in ((1, 8), (1, 64), (40, 8), (0, 8)):
        given = problem(family, Sizes(tokens=tokens, values=values), dtype)
        (state,) = given.states
        if v_first:
            state = np.ascontiguousarray(state.swapaxes(-1, -2))
        expected = call(form, given.inputs, (state,), **option)
        written = convert(library, state.copy())
        inputs = convert_all(library, given.inputs)
        o, (final,) = call(form, inputs, (written,), inplace_final_state=True, **option)
        assert final is written
        assert_same_bits((o, (final,)), expected)
        o, final = getattr(ops, FORMS[form].function)(
            **inputs, initial_state=convert(library, state.copy()), inplace_final_state=True, **option
        )
        assert_same_bits((o, (final,)), expected)


@pytest.mark.parametrize("form", IN_PLACE)
def test_in_place_with_packed_sequences(form):
    family, lengths = FORMS[form].family, (3, 0, 40)
    sizes = Sizes(batch=1, tokens=43)
    inputs, states = draw_inputs(family, sizes, "float32"), draw_states(family, sizes, "float32", sequences=3)
    option = {"cu_seqlens": bounds_of(lengths)}
    expected = call(form, inputs, states, **option)
    assert_same_bits(call(form, inputs, states, inplace_final_state=True, **option), expected)


@pytest.mark.parametrize("form", IN_PLACE)
def test_in_place_is_known_to_autograd(form):
    given = problem(FORMS[form].family, Sizes(tokens=1), "float32")
    state = torch.from_numpy(given.states[0].copy())
    before = state._version
    inputs = {name: torch.from_numpy(x.copy()) for name, x in given.inputs.items()}
    call(form, inputs, (state,), inplace_final_state=True)
    assert state._version > before


@pytest.mark.parametrize("form", WITH_STATES)
def test_states_are_left_alone(form):
    given = problem(FORMS[form].family, Sizes(tokens=5), "float32")
    states = tuple(x.copy() for x in given.states)
    _, finals = call(form, given.inputs, states)
    for state, before, final in zip(states, given.states, finals, strict=True):
        np.testing.assert_array_equal(state, before)
        assert not np.shares_memory(state, final)


@pytest.mark.parametrize("form", [name for name in WITH_STATES if FAMILIES[FORMS[name].family].is_normalized])
def test_the_second_state_may_be_left_out(form):
    given = problem("normalized", Sizes(), "float64")
    state = given.states[0]
    expected = call(form, given.inputs, (state, np.zeros_like(given.states[1])))
    # What is no pair is the first of the two.
    o, final = getattr(ops, FORMS[form].function)(
        **given.inputs, initial_state=state, output_final_state=True, normalize=True
    )
    assert_same_bits((o, final), expected)
    assert_same_bits(call(form, given.inputs, (state, None)), expected)
    assert accumulator("float64") == str(final[1].dtype)
