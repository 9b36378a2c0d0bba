"""What composed operators refuse: the message names the argument."""

import inspect

import numpy as np
import pytest
import torch

from subquad import ops
from subquad.ops.recurrent import recurrent

from .cases import DTYPES, Sizes
from .composed import FAMILIES, FIRST, FORMS, PARAMETERS, call, draw_inputs, draw_states

SIZES = Sizes(batch=1, tokens=6)
COMPLEX = {"a": "complex64 or complex128"}


@pytest.fixture(params=FORMS)
def form(request):
    """Every public function."""
    return request.param


@pytest.fixture
def family(form):
    """The operator that it computes."""
    return FAMILIES[FORMS[form][1]]


@pytest.fixture
def inputs(form):
    """Inputs that would be accepted."""
    return draw_inputs(FORMS[form][1], SIZES, "float32")


def free_axes(name):
    """Whether the last axis may be of any length."""
    return name in {"v", "s", "B"}


def test_shapes(form, family, inputs):
    for name in set(inputs) - {family.first}:
        right = inputs[name]
        wrong = [np.concatenate([right, right], axis=axis) for axis in range(right.ndim - free_axes(name))]
        if "mlstm" not in form:
            # Their axes are swapped for the call.
            wrong.append(right[None])
        for other in wrong:
            # Another number of heads of keys may fit, and `D` may be of channels.
            if family.is_grouped and name in "kB" and other.shape[2:3] != right.shape[2:3]:
                continue
            with pytest.raises(ValueError, match=rf"^{name}: expected shape \(.*\), got \("):
                call(form, {**inputs, name: other})


def test_ranks_of_the_first(form, family, inputs):
    name = family.first
    for wrong in (inputs[name][..., 0], inputs[name][..., None]):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(B, "):
            call(form, {**inputs, name: wrong})


@pytest.mark.parametrize(("family", "name"), [("gsa", "k"), ("ssd", "x")])
def test_numbers_of_heads(family, name):
    inputs = draw_inputs(family, Sizes(1, 6, 2, 4), "float32")
    others = draw_inputs(family, Sizes(1, 6, 3, 4), "float32")
    given = {**inputs, **{x: others[x] for x in ("k", "v", "s", "g", "B", "C") if x in others}}
    with pytest.raises(ValueError, match=f"^{name}: expected .* of "):
        call(FIRST[family], given)


def test_no_heads_of_keys():
    with pytest.raises(ValueError, match=r"^k: expected a number of heads that divides 2, that of q, got 0"):
        call(FIRST["gsa"], draw_inputs("gsa", Sizes(1, 6, 0, 2), "float32"))


@pytest.mark.parametrize("kind", [np.int32, bool])
def test_dtypes(kind, form, inputs):
    for name in inputs:
        with pytest.raises(TypeError, match=f"^{name}: expected dtype {COMPLEX.get(name, 'float')}"):
            call(form, {**inputs, name: inputs[name].real.astype(kind)})


def test_real_decays_do_not_turn():
    inputs = draw_inputs("gate_loop", SIZES, "float32")
    with pytest.raises(TypeError, match=r"^a: expected dtype complex64 or complex128, got float32"):
        call(FIRST["gate_loop"], {**inputs, "a": inputs["a"].real})


def test_mixed_dtypes(form, family, inputs):
    for name in set(inputs) - {family.first, "a", "dt", "z", *PARAMETERS}:
        for kind in ("float64", "bfloat16"):
            with pytest.raises(TypeError, match=f"^{name}: expected dtype float32"):
                call(form, {**inputs, name: inputs[name].astype(DTYPES[kind])})


def test_other_halves_are_no_gates(form):
    inputs = draw_inputs(FORMS[form][1], SIZES, "bfloat16")
    for name in set(inputs) & {"g", "i", "f"}:
        with pytest.raises(TypeError, match=f"^{name}: expected dtype bfloat16 or float32, got float16"):
            call(form, {**inputs, name: inputs[name].astype(np.float16)})


@pytest.mark.parametrize("wrong", [3.0, "no", [1.0, 2.0], object()], ids=lambda wrong: type(wrong).__name__)
def test_objects_that_are_no_arrays(wrong, form, inputs):
    function = getattr(ops, FORMS[form][0])
    options = {"chunk_size": 64} if "mamba" in form else {}
    for name in inputs:
        with pytest.raises(TypeError, match=f"^{name}: expected a PyTorch tensor, a NumPy array or another"):
            function(**{**inputs, name: wrong}, **options)


def test_required_arrays(form, inputs):
    function = getattr(ops, FORMS[form][0])
    options = {"chunk_size": 64} if "mamba" in form else {}
    for name in set(inputs) - {"g", "D", "z", "dt_bias"}:
        with pytest.raises(TypeError, match=f"^{name}: expected a.* array"):
            function(**{**inputs, name: None}, **options)


def test_mixed_libraries(form, family, inputs):
    for name in set(inputs) - {family.first}:
        expected = f"^{name}: expected a NumPy array as {family.first} is, got a PyTorch tensor"
        with pytest.raises(TypeError, match=expected):
            call(form, {**inputs, name: torch.from_numpy(inputs[name])})


def test_gates_above_0():
    for family, name, shown, wrong in (
        ("gsa", "g", "g", 1e-6),
        ("gate_loop", "a", r"log \|a\|", 1.01),
        ("ssd", "A", r"dt \* A", 0.5),
    ):
        inputs = draw_inputs(family, SIZES, "float32")
        inputs[name].reshape(-1)[-1] = wrong
        with pytest.raises(ValueError, match=f"^{shown}: expected natural logarithms of decays, 0 or below"):
            call(FIRST[family], inputs)


CU_SEQLENS = {
    "not from 0": ([1, 6], "a first element of 0"),
    "decreasing": ([0, 4, 3, 6], "numbers that do not decrease"),
    "too short": ([0, 5], "a last element of 6"),
    "too long": ([0, 7], "a last element of 6"),
    "empty": ([], "shape"),
    "matrix": ([[0, 6]], "shape"),
}


@pytest.mark.parametrize("kind", CU_SEQLENS)
def test_packed_sequences(kind, form, inputs):
    given, message = CU_SEQLENS[kind]
    with pytest.raises(ValueError, match=f"^cu_seqlens: expected {message}"):
        call(form, inputs, cu_seqlens=np.array(given, np.int64))


def test_packed_sequences_of_other_kinds(form, family, inputs):
    for wrong in (np.array([0.0, 6.0]), [0, 6], torch.tensor([0, 6]), 6):
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected"):
            call(form, inputs, cu_seqlens=wrong)
    rows = draw_inputs(FORMS[form][1], Sizes(batch=2, tokens=6), "float32")
    expected = rf"^{family.first}: expected shape \(1, .*\), as cu_seqlens is given, got \(2, "
    with pytest.raises(ValueError, match=expected):
        call(form, rows, cu_seqlens=np.array([0, 6]))


def states_by_name(form, sequences=1):
    """The initial states, each with the name that messages have for it."""
    family = FAMILIES[FORMS[form][1]]
    states = draw_states(FORMS[form][1], SIZES, "float32", sequences=sequences)
    if family.state == "c_initial":
        return list(zip(("c_initial", "n_initial", "m_initial"), states, strict=False))
    return [(family.state, state) for state in states]


def test_states(form, inputs):
    named = states_by_name(form)
    for i, (name, state) in enumerate(named):

        def given(wrong, i=i):
            return tuple(wrong if i == j else x for j, (_, x) in enumerate(named))

        for wrong in (state[:, :0], state[:0], np.concatenate([state, state], axis=1)):
            with pytest.raises(ValueError, match=rf"^{name}: expected shape \("):
                call(form, inputs, given(wrong))
        for kind in (np.int32, np.float16):
            with pytest.raises(TypeError, match=f"^{name}: expected dtype"):
                call(form, inputs, given(state.real.astype(kind)))
        with pytest.raises(TypeError, match=f"^{name}: expected a NumPy array"):
            call(form, inputs, given(torch.from_numpy(state)))


def test_numbers_of_states(form, inputs):
    names = "|".join(name for name, _ in states_by_name(form))
    states = draw_states(FORMS[form][1], SIZES, "float32", sequences=2)
    with pytest.raises(ValueError, match=f"^({names}): expected shape"):
        call(form, inputs, states, cu_seqlens=np.array([0, 1, 2, 6]))


def test_states_that_belong_together():
    inputs = {name: x.swapaxes(1, 2) for name, x in draw_inputs("mlstm", SIZES, "float32").items()}
    c, n, m = draw_states("mlstm", SIZES, "float32")
    for states, name in (
        ({"c_initial": c, "n_initial": n}, "m_initial"),
        ({"c_initial": c, "m_initial": m[..., None]}, "n_initial"),
        ({"n_initial": n, "m_initial": m[..., None]}, "c_initial"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected an array, as ._initial is given, got None"):
            ops.mlstm_chunkwise(**inputs, **states)
    with pytest.raises(TypeError, match=r"^n_initial: expected an array, as c_initial is given, got None"):
        ops.mlstm_siging_chunkwise(**inputs, c_initial=c, normalize=True)
    with pytest.raises(ValueError, match=r"^n_initial: expected None without normalize, got ndarray"):
        ops.mlstm_siging_chunkwise(**inputs, c_initial=c, n_initial=n)
    with pytest.raises(ValueError, match=r"^m_initial: expected shape \(1, 2, 1\)"):
        ops.mlstm_chunkwise(**inputs, c_initial=c, n_initial=n, m_initial=m)


def test_states_that_are_no_pair():
    inputs = draw_inputs("gsa", SIZES, "float32")
    hk, hv = draw_states("gsa", SIZES, "float32")
    for wrong in (hk, (hk,), (hk, hv, hk), "no"):
        with pytest.raises(TypeError, match=r"^initial_state: expected a pair \(hk, hv\), got"):
            ops.chunk_gsa(**inputs, initial_state=wrong)


def test_slots_that_are_none():
    inputs = draw_inputs("gsa", SIZES, "float32")
    none = {name: inputs[name][..., :0] for name in ("s", "g")}
    with pytest.raises(ValueError, match=r"^s: expected one slot or more, got shape \(1, 6, 2, 0\)"):
        ops.chunk_gsa(**{**inputs, **none})


def test_numbers_of_sequences():
    inputs = draw_inputs("ssd", SIZES, "float32")
    for wrong in (np.zeros((1, 5), int), np.zeros(6, int), np.zeros((2, 6), int)):
        with pytest.raises(ValueError, match=r"^seq_idx: expected shape \(1, 6\)"):
            call(FIRST["ssd"], inputs, seq_idx=wrong)
    for wrong in (
        np.zeros((1, 6)),
        np.zeros((1, 6), bool),
        [[0] * 6],
        torch.zeros((1, 6), dtype=torch.int32),
    ):
        with pytest.raises(TypeError, match=r"^seq_idx: expected"):
            call(FIRST["ssd"], inputs, seq_idx=wrong)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a last element of 6"):
        call(FIRST["ssd"], inputs, seq_idx=np.zeros((1, 6), int), cu_seqlens=np.array([0, 5]))
    with pytest.raises(ValueError, match=r"^return_varlen_states: expected False, as cu_seqlens is None"):
        ops.mamba_chunk_scan_combined(**inputs, chunk_size=64, return_varlen_states=True)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_gates_of_step_sizes(requires_grad):
    inputs = {name: torch.from_numpy(x) for name, x in draw_inputs("ssd", SIZES, "float32").items()}
    inputs["dt"] = inputs["dt"].abs().requires_grad_(requires_grad)
    call(FIRST["ssd"], inputs)
    with pytest.raises(ValueError, match=r"^dt \* A: expected natural logarithms of decays, 0 or below"):
        call(FIRST["ssd"], {**inputs, "A": -inputs["A"]})
    below = {"dt_softplus": False, "dt_limit": (-1.0, 2.0)}
    without = {name: x for name, x in inputs.items() if name != "dt_bias"}
    call(FIRST["ssd"], without, **below)
    with pytest.raises(ValueError, match=r"^dt \* A: expected natural logarithms of decays, 0 or below"):
        call(FIRST["ssd"], {**without, "dt": -inputs["dt"]}, **below)


def test_options_of_step_sizes():
    rows, steps, rates = np.zeros((1, 3, 2, 4), np.float32), np.ones((1, 3, 2), np.float32), -np.ones(2)
    given = {"beta": steps, "step_rates": rates}
    for options, message in (
        ({"step_rates": rates}, "beta: expected step sizes, as step_rates is given"),
        ({**given, "g": -steps}, "g: expected None, as step_rates is given"),
        ({**given, "step_rates": np.ones(2)}, "g: expected natural logarithms"),
        ({**given, "step_limits": (-1.0, 1.0)}, "g: expected natural logarithms"),
        ({**given, "step_rates": np.ones(3)}, r"step_rates: expected shape \(2,\)"),
        ({**given, "step_bias": np.ones((1, 2))}, r"step_bias: expected shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            recurrent(rows, rows, rows, output_final_state=False, **options)


def test_chunk_sizes(form, inputs):
    takes_any = "mamba" in form or "chunkwise" in form
    for size in (0, -1) if takes_any else (0, 8, 24, 96, True):
        with pytest.raises((ValueError, TypeError), match="chunk_size"):
            call(form, inputs, chunk_size=size)


def test_unknown_keywords(form, inputs):
    for name in ("no_such", "window_size", "head_first"):
        with pytest.raises(TypeError, match=name):
            call(form, inputs, **{name: True})


def test_keywords_without_effect(form, inputs):
    parameters = inspect.signature(getattr(ops, FORMS[form][0])).parameters
    if "kwargs" in parameters:
        expected = call(form, inputs)[0]
        for name in ("cu_seqlens_cpu", "chunk_indices", "disable_recompute", "safe_gate", "checkpoint_level"):
            np.testing.assert_array_equal(call(form, inputs, **{name: 1})[0], expected)


@pytest.mark.parametrize(
    ("form", "values"), [("gate_loop", "v"), ("mlstm", "v"), ("mlstm_siging", "v"), ("ssd", "x")]
)
def test_large_states(form, values):
    inputs = draw_inputs(FORMS[FIRST[form]][1], Sizes(1, 2, 1, 1, 2100, 2100), "float32")
    with pytest.raises(NotImplementedError, match=f"^{values}: a state of "):
        call(FIRST[form], inputs)
