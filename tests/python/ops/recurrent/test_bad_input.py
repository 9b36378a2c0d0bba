"""What is refused: the message names the argument."""

import numpy as np
import pytest
import torch

from subquad import ops

from .cases import DTYPES, FAMILIES, FIRST, FORMS, Sizes, call, draw_inputs, draw_states

SIZES = Sizes(batch=1, tokens=6)


@pytest.fixture(params=FORMS)
def form(request):
    """Every public function."""
    return request.param


@pytest.fixture
def inputs(form):
    """Inputs that would be accepted."""
    return draw_inputs(FORMS[form].family, SIZES, "float32")


def public(form, name):
    """What the function calls an input."""
    return FORMS[form].names.get(name, name)


def test_shapes(form, inputs):
    for name in inputs:
        shown = public(form, name)
        if name == FAMILIES[FORMS[form].family].queries:
            # The others are measured by the queries.
            continue
        right = inputs[name]
        for wrong in (
            right[None],
            np.asarray(right[0]),
            np.repeat(right, 2, axis=-1),
            right[..., :1],
            right[:0],
        ):
            if name == "beta" and wrong.ndim == 4:
                # That would be one for each value.
                continue
            # Values may be of any width.
            if wrong.ndim != right.ndim or wrong.shape[:-1] != right.shape[:-1] or name != "v":
                with pytest.raises(ValueError, match=f"^{shown}: expected shape"):
                    call(form, {**inputs, name: wrong})


def test_ranks_of_queries(form, inputs):
    name = FAMILIES[FORMS[form].family].queries
    for wrong in (inputs[name][0], inputs[name][None]):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape .*\[?B, T, H, K\]?"):
            call(form, {**inputs, name: wrong})


def test_numbers_of_tokens(form, inputs):
    queries = FAMILIES[FORMS[form].family].queries
    for name in set(inputs) - {"u", "g_gamma", queries}:
        with pytest.raises(ValueError, match=f"^{public(form, name)}: expected shape"):
            call(form, {**inputs, name: inputs[name][:, :-1]})


def test_heads_that_do_not_divide(form, inputs):
    sizes = Sizes(batch=1, tokens=6, heads=2, value_heads=3)
    values = draw_inputs(FORMS[form].family, sizes, "float32")["v"]
    with pytest.raises(ValueError, match=r"^v: expected"):
        call(form, {**inputs, "v": values})


@pytest.mark.parametrize("kind", [np.int32, np.complex64, bool])
def test_dtypes(kind, form, inputs):
    for name in inputs:
        with pytest.raises(TypeError, match=f"^{public(form, name)}: expected dtype"):
            call(form, {**inputs, name: inputs[name].astype(kind)})


def test_mixed_dtypes(form, inputs):
    queries = FAMILIES[FORMS[form].family].queries
    for name in set(inputs) - {queries}:
        if name in {"u", "g_gamma"}:
            continue
        for kind in ("float64", "bfloat16"):
            with pytest.raises(TypeError, match=f"^{public(form, name)}: expected dtype float32"):
                call(form, {**inputs, name: inputs[name].astype(DTYPES[kind])})


def test_other_halves_are_no_gates(form):
    inputs = draw_inputs(FORMS[form].family, SIZES, "bfloat16")
    for name in set(inputs) & {"g", "gk", "w", "beta"}:
        with pytest.raises(TypeError, match=f"^{public(form, name)}: expected dtype bfloat16 or float32"):
            call(form, {**inputs, name: inputs[name].astype(np.float16)})


@pytest.mark.parametrize("wrong", [3.0, "no", [1.0, 2.0], object()], ids=lambda wrong: type(wrong).__name__)
def test_objects_that_are_no_arrays(wrong, form, inputs):
    for name in inputs:
        with pytest.raises(TypeError, match=f"^{public(form, name)}: expected"):
            call(form, {**inputs, name: wrong})


def test_required_arrays(form, inputs):
    optional = {"g", "gk", "beta", "g_gamma"}
    for name in set(inputs) - optional:
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            call(form, {**inputs, name: None})


def test_mixed_libraries(form, inputs):
    queries = FAMILIES[FORMS[form].family].queries
    for name in set(inputs) - {queries}:
        with pytest.raises(TypeError, match=f"^{public(form, name)}: expected a NumPy array"):
            call(form, {**inputs, name: torch.from_numpy(inputs[name])})


@pytest.mark.parametrize("gate", [1e-6, 0.5, np.inf])
def test_gates_above_0(gate, form, inputs):
    for name in set(inputs) & {"g", "gk", "w", "g_gamma"}:
        inputs[name].reshape(-1)[-1] = gate
        with pytest.raises(ValueError, match=f"^{public(form, name)}: expected natural logarithms of decays"):
            call(form, inputs)


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name].family == "constant"])
def test_two_kinds_of_gates(form, inputs):
    inputs["g"] = np.zeros((1, 6, 2), np.float32)
    with pytest.raises(ValueError, match=r"^g_gamma: expected None, as g is given"):
        call(form, inputs)


CU_SEQLENS = {
    "not from 0": ([1, 6], "a first element of 0"),
    "decreasing": ([0, 4, 3, 6], "numbers that do not decrease"),
    "too short": ([0, 5], "a last element of 6"),
    "too long": ([0, 7], "a last element of 6"),
    "negative": ([0, -1, 6], "numbers that do not decrease"),
    "empty": ([], "shape"),
    "matrix": ([[0, 6]], "shape"),
}


@pytest.mark.parametrize("form", [name for name in FORMS if "parallel_delta_rule" not in name])
@pytest.mark.parametrize("kind", CU_SEQLENS)
def test_packed_sequences(kind, form, inputs):
    given, message = CU_SEQLENS[kind]
    with pytest.raises(
        ValueError,
        match=f"^cu_seqlens: expected .*{message}" if message != "shape" else "^cu_seqlens: expected shape",
    ):
        call(form, inputs, cu_seqlens=np.array(given, np.int64))


@pytest.mark.parametrize("form", [name for name in FORMS if "parallel_delta_rule" not in name])
def test_packed_sequences_of_other_kinds(form, inputs):
    for wrong in (np.array([0.0, 6.0]), [0, 6], torch.tensor([0, 6]), 6):
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected"):
            call(form, inputs, cu_seqlens=wrong)
    named = FORMS[form].family
    queries = FAMILIES[named].queries
    message = rf"^{queries}: expected shape \(1, .*\), as cu_seqlens is given, got \(2, "
    with pytest.raises(ValueError, match=message):
        call(form, draw_inputs(named, Sizes(batch=2, tokens=6), "float32"), cu_seqlens=np.array([0, 6]))


WITH_STATES = [name for name, form in FORMS.items() if form.has_state]


@pytest.mark.parametrize("form", WITH_STATES)
def test_states(form, inputs):
    family = FORMS[form].family
    (state, *rest) = draw_states(family, SIZES, "float32")

    def given(state):
        return (state, *rest)

    for wrong in (state[0], state[:, :1], state[:0], state[..., :-1], state.swapaxes(-1, -2), state[None]):
        with pytest.raises(ValueError, match=r"^initial_state: expected shape"):
            call(form, inputs, given(wrong))
    for kind in ("float64", "float16"):
        with pytest.raises(TypeError, match=r"^initial_state: expected dtype"):
            call(form, inputs, given(state.astype(DTYPES[kind])))
    with pytest.raises(TypeError, match=r"^initial_state: expected"):
        call(form, inputs, given(torch.from_numpy(state)))
    with pytest.raises(TypeError, match=r"^initial_state: expected"):
        call(form, inputs, given(3.0))
    if rest:
        for wrong in (
            rest[0][:, 0],
            rest[0][..., :-1],
            np.repeat(rest[0], 2, axis=1),
            rest[0].swapaxes(1, 2),
        ):
            with pytest.raises(ValueError, match=r"^initial_state: expected"):
                call(form, inputs, (state, wrong))


@pytest.mark.parametrize("form", WITH_STATES)
def test_numbers_of_states(form, inputs):
    states = draw_states(FORMS[form].family, SIZES, "float32", sequences=2)
    with pytest.raises(ValueError, match=r"^initial_state: expected shape"):
        call(form, inputs, states, cu_seqlens=np.array([0, 1, 2, 6]))


@pytest.mark.parametrize(
    "form",
    [
        name
        for name in FORMS
        if name.startswith(("fused_recurrent_g", "fused_recurrent_k")) and "gla" not in name
    ],
)
def test_states_that_cannot_be_written(form, inputs):
    (state,) = draw_states(FORMS[form].family, SIZES, "float32")
    option = {"inplace_final_state": True}
    with pytest.raises(
        ValueError, match=r"^initial_state: expected the states, as inplace_final_state is set"
    ):
        call(form, inputs, None, **option)
    locked = state.copy()
    locked.setflags(write=False)
    for wrong in (locked, state[:, ::-1], np.repeat(state, 2, axis=-1)[..., ::2]):
        with pytest.raises((ValueError, TypeError), match=r"^initial_state: expected"):
            call(form, inputs, (wrong,), **option)
    with pytest.raises(ValueError, match=r"^initial_state: expected memory of its own"):
        call(form, {**inputs, "v": state.reshape(-1)[:96].reshape(1, 6, 2, 8)}, (state,), **option)
    half = draw_inputs(FORMS[form].family, SIZES, "bfloat16")
    with pytest.raises(TypeError, match=r"^initial_state: expected dtype float32"):
        call(form, half, (state.astype(DTYPES["bfloat16"]),), **option)


def test_chunk_sizes(form, inputs):
    takes_it = bool({"chunk_size", "kwargs"} & {*parameters(form)})
    for size in (0, -16, 8, 24, 48, 96, True):
        with pytest.raises(ValueError if takes_it else TypeError, match=r"chunk_size: expected|'chunk_size'"):
            call(form, inputs, chunk_size=size)
    for wrong in (16.0, "64"):
        with pytest.raises(TypeError, match=r"chunk_size: expected an integer, got|'chunk_size'"):
            call(form, inputs, chunk_size=wrong)


def test_unknown_keywords(form, inputs):
    for name in ("no_such", "window_size", "dropout", "g_gama"):
        with pytest.raises(TypeError, match=name):
            call(form, inputs, **{name: 1.0})


def test_keywords_without_effect(form, inputs):
    expected = call(form, inputs)[0]
    if any(kind.kind is kind.VAR_KEYWORD for kind in parameters(form).values()):
        for name in (
            "cu_seqlens_cpu",
            "chunk_indices",
            "disable_recompute",
            "safe_gate",
            "checkpoint_level",
            "use_graph",
            "max_num_seqs",
        ):
            np.testing.assert_array_equal(call(form, inputs, **{name: 1})[0], expected)
        np.testing.assert_array_equal(call(form, inputs, head_first=False)[0], expected)
        with pytest.raises(TypeError, match=r"^head_first: expected no such argument"):
            call(form, inputs, head_first=True)


def parameters(form):
    """Those of the function."""
    import inspect

    return inspect.signature(getattr(ops, FORMS[form].function)).parameters


ASKED = {
    "output_attentions": True,
    "cp_context": object(),
    "gv": np.zeros((1, 6, 2, 8), np.float32),
    "return_intermediate_states": True,
}


def test_what_the_engine_has_not(form, inputs):
    for name in set(ASKED) & set(parameters(form)):
        with pytest.raises(NotImplementedError, match=f"^{name}: .* is not supported"):
            call(form, inputs, **{name: ASKED[name]})
        call(form, inputs, **{name: False if isinstance(ASKED[name], bool) else None})


@pytest.mark.parametrize("form", [name for name in FORMS if FAMILIES[FORMS[name].family].is_delta])
def test_a_strength_for_each_value(form, inputs):
    inputs["beta"] = np.repeat(inputs["beta"][..., None], 8, axis=-1)
    with pytest.raises(NotImplementedError, match=r"^beta: shape .* is not supported"):
        call(form, inputs)


@pytest.mark.parametrize("form", [FIRST["gated_delta_rule"], FIRST["kda"]])
def test_gates_that_cannot_be_computed(form, inputs):
    option = {"use_gate_in_kernel": True}
    rates = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"^A_log: expected an array"):
        call(form, inputs, **option)
    with pytest.raises(ValueError, match=r"^A_log: expected 2 elements"):
        call(form, inputs, A_log=np.zeros(1, np.float32), **option)
    with pytest.raises(ValueError, match=r"^dt_bias: expected [0-9]+ elements"):
        call(form, inputs, A_log=rates, dt_bias=np.zeros(3, np.float32), **option)
    for name in ("A_log", "dt_bias"):
        for wrong in (torch.zeros(2), 3.0):
            with pytest.raises(TypeError, match=f"^{name}: expected"):
                call(form, inputs, **{"A_log": rates, name: wrong}, **option)
    with pytest.raises(ValueError, match=r"^allow_neg_eigval: expected False"):
        call(form, inputs, allow_neg_eigval=True)
    with pytest.raises(ValueError, match=r"^beta: expected an array"):
        call(form, {**inputs, "beta": None}, use_beta_sigmoid_in_kernel=True)


@pytest.mark.parametrize("bound", [0.0, 1.0, np.nan])
def test_bounds_that_are_not_below_0(bound):
    inputs = draw_inputs("kda", SIZES, "float32")
    message = "^lower_bound: expected a number below 0"
    with pytest.raises(ValueError, match=message):
        call(FIRST["kda"], inputs, use_gate_in_kernel=True, lower_bound=bound)
    with pytest.raises(ValueError, match=message):
        ops.fused_kda_gate(inputs["g"], lower_bound=bound)
    for family in ("dplr", "rwkv7"):
        with pytest.raises(ValueError, match=message):
            call(FIRST[family], draw_inputs(family, SIZES, "float32"), lower_bound=bound)


def test_numbers_of_keys_and_layers():
    inputs = draw_inputs("gated_delta_product", SIZES, "float32")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=r"^num_householder: expected 1 or more"):
            call(FIRST["gated_delta_product"], inputs, num_householder=wrong)
    with pytest.raises(ValueError, match=r"^k: expected shape"):
        call(FIRST["gated_delta_product"], inputs, num_householder=2)
    inputs = draw_inputs("lightning_attn", SIZES, "float32")
    for wrong in ({"layer_idx": -1}, {"layer_idx": 4}, {"num_layers": 0}):
        with pytest.raises(ValueError, match=r"^layer_idx: expected 0 to num_layers"):
            call(FIRST["lightning_attn"], inputs, **wrong)


def test_large_states(form):
    inputs = draw_inputs(FORMS[form].family, Sizes(1, 2, 1, 1, 2100, 2100), "float32")
    with pytest.raises(NotImplementedError, match=r"^v: a state of 2100 x 2100 is not supported"):
        call(form, inputs)


def test_other_devices(form, inputs):
    queries = FAMILIES[FORMS[form].family].queries
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with pytest.raises(ValueError, match=f"^{queries}: expected a CPU array, got one on meta"):
        call(form, {**tensors, queries: tensors[queries].to("meta")})


def test_the_old_name_of_a_layout():
    inputs, states = draw_inputs("kda", SIZES, "float32"), draw_states("kda", SIZES, "float32")
    turned = (np.ascontiguousarray(states[0].swapaxes(-1, -2)),)
    expected = call("chunk_kda kda", inputs, turned, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout") as record:
        found = call("chunk_kda kda", inputs, turned, transpose_state_layout=True)
    assert record[0].filename.endswith("cases.py")
    for x, y in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match=r"^transpose_state_layout: expected no such argument"):
        call("chunk_kda kda", inputs, turned, transpose_state_layout=True, state_v_first=True)
    with pytest.raises(TypeError, match=r"^transpose_state_layout: expected no such argument"):
        call("chunk_rwkv6 rwkv6", draw_inputs("rwkv6", SIZES, "float32"), transpose_state_layout=True)
