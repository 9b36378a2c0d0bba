"""The calls of recurrent operators, and the check of what they give."""

import dataclasses
import sys

import numpy as np
import pytest

import subquad
from subquad import ops
from subquad.cli.bench import (
    recurrent_calls,
    recurrent_check,
    recurrent_fallbacks,
    recurrent_inputs,
    tensors,
    turns,
)
from subquad.cli.bench.recurrent_calls import RecurrentCalls
from subquad.cli.bench.recurrent_check import Results
from subquad.cli.bench.recurrent_operators import OPERATORS
from subquad.cli.bench.recurrent_shape import RecurrentShape

pytestmark = pytest.mark.usefixtures("keep_threads")

SIZES = {"B": 2, "H": 2, "K": 8, "V": 6, "M": 4, "P": 6, "G": 1, "N": 8, "D": 6, "W": 4}
# What transformers' functions compute.
FALLBACKS = (
    "linear_attn",
    "simple_gla",
    "retention",
    "lightning_attn",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "mamba2",
    "mamba",
    "causal_conv1d",
)
STEPS = [name for name, operator in OPERATORS.items() if operator.step]


def make_shape(name: str, dtype: str = "float32", **changes) -> RecurrentShape:
    letters = {*OPERATORS[name].letters, "B"}
    fields = {
        "sizes": {letter: size for letter, size in SIZES.items() if letter in letters},
        "tokens": (1 if changes.get("form") == "step" else 70,),
        "torch_floor": {dtype: 0},
        **changes,
    }
    return RecurrentShape("a", name, dtypes=(dtype,), **fields)  # type: ignore[arg-type]


def make(name: str, dtype: str = "float32", *, use_torch: bool = False, **changes) -> RecurrentCalls:
    return recurrent_calls.make(make_shape(name, dtype, **changes), dtype, use_torch=use_torch)


def require(dtype: str, *, use_torch: bool) -> None:
    if use_torch:
        pytest.importorskip("transformers")
    elif tensors.numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")


@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OPERATORS)
def test_results_are_right(use_torch, dtype, name):
    require(dtype, use_torch=use_torch)
    calls = make(name, dtype, use_torch=use_torch)
    found = calls.check(dtype)
    assert found.failure == ""
    assert 0 <= found.error <= recurrent_check._TOLERANCE[dtype]
    assert (calls.theirs is not None) == (use_torch and name in FALLBACKS)
    assert calls.ours().shape == calls.shape.axes(calls.shape.kind.out)
    assert calls.base is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_right(dtype, name):
    require(dtype, use_torch=True)
    calls = make(name, dtype, use_torch=True, form="training")
    assert calls.check(dtype).failure == ""
    gradients = calls.ours().gradients
    assert list(gradients) == list(calls.shape.kind.inputs)
    # Each call makes them anew.
    first = {each: gradient.clone() for each, gradient in gradients.items()}
    for each, gradient in calls.ours().gradients.items():
        np.testing.assert_array_equal(
            recurrent_inputs.exactly(gradient), recurrent_inputs.exactly(first[each])
        )
    assert calls.base is not None
    assert calls.base().requires_grad is False


@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_right(use_torch, dtype, name):
    require(dtype, use_torch=use_torch)
    calls = make(name, dtype, use_torch=use_torch, form="step")
    before = recurrent_inputs.exactly(calls.state)
    calls.ours()
    found = calls.check(dtype)
    assert found.failure == ""
    assert found.error <= recurrent_check._TOLERANCE[dtype]
    np.testing.assert_array_equal(recurrent_inputs.exactly(calls.state), before)
    assert (calls.theirs is not None) == use_torch


def test_steps_take_turns_on_states(monkeypatch):
    size = make_shape("kda", form="step").useful_bytes("float32") // 2
    monkeypatch.setattr(turns, "_WORKING_SET", 2 * size + 1)
    calls = make("kda", form="step")
    assert len(calls.states) == 3
    results = [calls.ours() for _ in range(4)]
    assert [result.state.ctypes.data for result in results] == [
        calls.states[index].ctypes.data for index in (0, 1, 2, 0)
    ]
    # The first has gone two steps, the others one.
    np.testing.assert_array_equal(calls.states[1], calls.states[2])
    assert not np.array_equal(calls.states[0], calls.states[1])


def test_the_bandwidth_is_that_of_what_the_calls_move(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "subquad.cli.bench.bandwidth.copy_rate", lambda array, _: asked.append(array) or (lambda: 1.0)
    )
    monkeypatch.setattr(
        "subquad.cli.bench.bandwidth.update_rate", lambda arrays, _: asked.append(arrays) or (lambda: 2.0)
    )
    shape = make_shape("causal_conv1d")
    inputs = recurrent_inputs.make(shape, "float32", use_torch=False)
    convolution = RecurrentCalls(shape, inputs, ours=int, once=int)
    steps = make("kda", form="step")
    rates = [calls.peak("float32", 2, use_torch=False).measure() for calls in (convolution, steps)]
    assert rates == [1.0, 2.0]
    assert asked[0] is inputs["x"]
    assert asked[1] is steps.states
    assert make("kda").peak("float32", 2, use_torch=False).name == "peak/2"
    training = RecurrentCalls(make_shape("kda", form="training"), {}, ours=int, once=int)
    assert training.peak("float32", 2, use_torch=False) is None


def test_attention_of_the_same_tokens(monkeypatch):
    seen = []
    monkeypatch.setattr(subquad, "attention", lambda *arrays, **options: seen.append((arrays, options)))
    calls = make("simple_gla", against="attention")
    assert calls.base is not None
    calls.base()
    ((arrays, options),) = seen
    assert all(array is calls.inputs[name] for array, name in zip(arrays, "qkv", strict=True))
    assert options == {"causal": True}


@pytest.mark.parametrize("use_torch", [False, True])
def test_later_tokens_repeat_the_earlier_ones(monkeypatch, use_torch):
    if use_torch:
        pytest.importorskip("torch")
    monkeypatch.setattr(recurrent_inputs, "_PERIOD", 7)
    for name in ("gated_delta_product", "mlstm", "mamba"):
        shape = make_shape(name, tokens=(17,))
        inputs = recurrent_inputs.make(shape, "float32", use_torch=use_torch)
        for each, one in shape.kind.inputs.items():
            array = np.asarray(inputs[each])
            assert array.shape == shape.axes(one.axes)
            axis = next((axis for axis, letter in enumerate(one.axes) if letter in "TU"), None)
            if axis is not None:
                later = np.take(array, range(7, 14), axis)
                np.testing.assert_array_equal(later, np.take(array, range(7), axis))
                assert np.ptp(np.take(array, range(7), axis)) > 0


@pytest.mark.parametrize("use_torch", [False, True])
def test_channels_last(use_torch):
    if use_torch:
        pytest.importorskip("torch")
    shape = make_shape("causal_conv1d")
    turned = dataclasses.replace(shape, channels_last=True)
    first, last = (
        recurrent_inputs.make(each, "float32", use_torch=use_torch)["x"] for each in (shape, turned)
    )
    np.testing.assert_array_equal(np.asarray(first), np.asarray(last))
    strides = last.stride() if use_torch else [each // 4 for each in last.strides]
    assert list(strides) == [6 * 70, 1, 6]


def test_gates_and_states_are_float32_beside_half_types():
    pytest.importorskip("ml_dtypes")
    inputs = recurrent_inputs.make(make_shape("kda", "bfloat16"), "bfloat16", use_torch=False)
    names = {name: str(each.dtype) for name, each in inputs.items()}
    assert names == {**dict.fromkeys(("q", "k", "v", "beta"), "bfloat16"), "g": "float32"}
    assert recurrent_inputs.make_state(make_shape("kda"), "bfloat16", inputs["q"]).dtype == np.float32
    assert inputs["g"].max() < 0


def failure_of(calls: RecurrentCalls, found: Results) -> str:
    return calls.checked("float32", found, None).failure


def test_wrong_outputs_are_found():
    calls = make("kda")
    out = np.array(calls.once().out)
    assert failure_of(calls, Results(out)) == ""
    far = out.copy()
    far[-1, 3, -1, 2] += 1e-3
    assert failure_of(calls, Results(far)).startswith("out off by ")
    # The oracle does not see the first head.
    out[0, 69, 0, 0] = np.nan
    assert failure_of(calls, Results(out)) == "NaN or infinity in out"
    assert "expected (2, 70, 2, 6) float32, got (2, 69, 2, 6) float32" in failure_of(
        calls, Results(out[:, 1:])
    )
    assert "got (2, 70, 2, 6) float64" in failure_of(calls, Results(out.astype(np.float64)))


def test_what_differs_from_the_fallback_is_found():
    pytest.importorskip("transformers")
    calls = make("kda", use_torch=True)
    found, theirs = calls.once(), calls.theirs_once()
    assert calls.checked("float32", found, theirs).failure == ""
    theirs.out[0, 0, 0, 0] += 1
    assert "from transformers' fallback" in calls.checked("float32", found, theirs).failure


def test_wrong_states_are_found():
    calls = make("kda", form="step")
    found = calls.once()
    state = np.array(found.state)
    state[-1, -1, 0, 0] += 1e-3
    assert failure_of(calls, Results(found.out, state)).startswith("state off by ")
    assert "state: expected (2, 2, 8, 6) float32" in failure_of(calls, Results(found.out, state[:1]))


@pytest.mark.parametrize("name", ["q", "g"])
def test_wrong_gradients_are_found(name):
    torch = pytest.importorskip("torch")
    shape = make_shape("gated_delta_rule", form="training", torch_floor={})
    inputs = recurrent_inputs.make(shape, "float32", use_torch=True)
    do = recurrent_inputs.make_output_gradient(shape, inputs["q"])
    calls = RecurrentCalls(shape, inputs, ours=int, once=int, do=do)
    gradients = {each: torch.zeros_like(array) for each, array in inputs.items()}
    found = Results(recurrent_calls.function(shape)(inputs), gradients=gradients)
    assert failure_of(calls, found).startswith("gradient of q off by ")
    gradients[name] = gradients[name][:, 1:]
    assert f"gradient of {name}: expected" in failure_of(calls, found)
    gradients[name] = torch.full_like(inputs[name], torch.nan)
    assert failure_of(calls, found) == f"NaN or infinity in gradient of {name}"


def test_retention_is_checked_in_all_heads():
    # The decay of a head follows from its number.
    calls = make("retention", tokens=(3000,), sizes={"H": 3, "K": 4, "V": 4})
    out = np.array(calls.once().out)
    out[0, 5, 0, 0] += 1e-2
    assert failure_of(calls, Results(out)).startswith("out off by ")


def test_transformers_functions_are_the_plain_ones():
    pytest.importorskip("transformers")
    for fallback in recurrent_fallbacks._FALLBACKS.values():
        plain = recurrent_fallbacks._plain(fallback)
        assert plain is not None
        assert plain.__module__.startswith("transformers.models.")
        assert not hasattr(plain, "__wrapped__")


def test_fallbacks_that_there_are_not(monkeypatch):
    pytest.importorskip("transformers")
    assert recurrent_fallbacks.find(make_shape("gla")) == (None, "transformers has no fallback for gla")
    module = "transformers.models.kimi_linear.modeling_kimi_linear"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        found, why = recurrent_fallbacks.find(make_shape("kda"))
    assert found is None
    assert why == "the installed transformers has no chunk_kimi_delta_attention in kimi_linear"
    monkeypatch.setattr(f"{module}.chunk_kimi_delta_attention", ops.chunk_kda)  # another package's
    assert recurrent_fallbacks.find(make_shape("kda")) == (None, why)
    monkeypatch.delattr(f"{module}.chunk_kimi_delta_attention")
    assert recurrent_fallbacks.find(make_shape("kda")) == (None, why)
    monkeypatch.setattr(recurrent_fallbacks, "find_spec", lambda _: None)
    calls = make("kda", use_torch=True)
    assert (calls.theirs, calls.missing) == (
        None,
        "transformers is not installed: no fallbacks to compare with",
    )


def test_no_fallback_where_it_is_not_asked_for():
    pytest.importorskip("transformers")
    calls = make("kda", use_torch=True, torch_floor={})
    assert (calls.theirs, calls.missing) == (None, "")
