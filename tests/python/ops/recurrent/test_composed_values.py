"""Composed operators with numbers at their limits: gates, phases, step sizes, NaN, inputs of large norm."""

from functools import cache

import numpy as np
import pytest

from subquad import ops

from .cases import DTYPES, HALF, Problem, Sizes, assert_largest_close, check
from .composed import FIRST, FORMS, call, check_found, draw_inputs, draw_states, expect, part
from .test_values import KINDS

SIZES = Sizes(batch=1, tokens=100)


@cache
def gated(kind, dtype):
    """Gated slot attention with gates of that kind."""
    inputs = draw_inputs("gsa", SIZES, dtype)
    inputs["g"] = KINDS[kind](np.random.default_rng(7), inputs["g"].shape).astype(DTYPES[dtype])
    states = draw_states("gsa", SIZES, dtype)
    return Problem(inputs, states, expect("gsa", inputs, states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_slots(kind, dtype, way):
    given = gated(kind, dtype)
    check_found(call(FIRST["gsa"], given.inputs, given.states), given.expected, dtype)


@cache
def turning(kind, dtype):
    """GateLoop with decays of that kind, turned by any phases."""
    inputs = draw_inputs("gate_loop", SIZES, dtype)
    lengths = np.exp(KINDS[kind](np.random.default_rng(7), inputs["a"].shape))
    phases = np.random.default_rng(8).uniform(-np.pi, np.pi, inputs["a"].shape)
    inputs["a"] = (lengths * np.exp(1j * phases)).astype(inputs["a"].dtype)
    states = draw_states("gate_loop", SIZES, dtype)
    return Problem(inputs, states, expect("gate_loop", inputs, states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decays_that_turn(kind, dtype, way):
    given = turning(kind, dtype)
    check_found(call(FIRST["gate_loop"], given.inputs, given.states), given.expected, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("decay", [1.0, -1.0, 1j, -1j, 0.0])
def test_decays_on_the_axes(decay, dtype):
    inputs = draw_inputs("gate_loop", SIZES, dtype)
    inputs["a"] = np.full_like(inputs["a"], decay)
    states = draw_states("gate_loop", SIZES, dtype)
    check_found(call(FIRST["gate_loop"], inputs, states), expect("gate_loop", inputs, states), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_phases_add_up_over_many_tokens(dtype):
    sizes = Sizes(batch=1, tokens=3000, heads=1, value_heads=1, keys=4)
    inputs = draw_inputs("gate_loop", sizes, dtype)
    phases = np.random.default_rng(8).uniform(2.0, 3.0, inputs["a"].shape)
    inputs["a"] = (0.9999 * np.exp(1j * phases)).astype(inputs["a"].dtype)
    check_found(call(FIRST["gate_loop"], inputs), expect("gate_loop", inputs), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("forget", [-1e4, -200.0, -30.0, 0.0, 30.0, 1e4, "of all sizes"])
@pytest.mark.parametrize("family", ["mlstm", "mlstm_siging", "mlstm_siging normalized"])
def test_forget_gates(family, forget, dtype, way):
    inputs = draw_inputs(family, SIZES, dtype)
    drawn = np.random.default_rng(2).standard_normal(inputs["f"].shape) * 50
    inputs["f"] = (drawn if forget == "of all sizes" else np.full(drawn.shape, forget)).astype(DTYPES[dtype])
    states = draw_states(family, SIZES, dtype)
    check_found(call(FIRST[family], inputs, states), expect(family, inputs, states), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("write", [-np.inf, -1000.0, -60.0, 60.0, 1000.0, "of all sizes"])
@pytest.mark.parametrize("family", ["mlstm", "mlstm_siging", "mlstm_siging normalized"])
def test_input_gates(family, write, dtype, way):
    inputs = draw_inputs(family, SIZES, dtype)
    drawn = np.random.default_rng(2).standard_normal(inputs["i"].shape) * 50
    inputs["i"] = (drawn if write == "of all sizes" else np.full(drawn.shape, write)).astype(DTYPES[dtype])
    # Denominators that do not cancel.
    for name in "qk":
        inputs[name] = abs(inputs[name])
    check_found(call(FIRST[family], inputs), expect(family, inputs), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_eps(dtype):
    inputs = draw_inputs("mlstm", SIZES, dtype)
    for eps in (0.0, 0.5):
        check_found(call(FIRST["mlstm"], inputs, eps=eps), expect("mlstm", inputs, eps=eps), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_of_slots_of_all_weights(dtype):
    inputs = draw_inputs("abc", Sizes(batch=1, tokens=500), dtype)
    inputs["s"] = (20 * inputs["s"].astype(np.float64)).astype(DTYPES[dtype])
    check_found(call(FIRST["abc"], inputs), expect("abc", inputs), dtype)


STEPS = {
    "clipped": {"dt_softplus": True, "dt_limit": (0.4, 0.9)},
    "as they are": {"dt_softplus": False},
    "clipped as they are": {"dt_softplus": False, "dt_limit": (0.1, 2.0)},
    "large": {"dt_softplus": True, "dt_limit": (50.0, 100.0)},
    "none": {"dt_softplus": True, "dt_limit": (0.0, 0.0)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", STEPS)
def test_step_sizes(kind, dtype, way):
    inputs, states = draw_inputs("ssd", SIZES, dtype), draw_states("ssd", SIZES, dtype)
    found = call(FIRST["ssd"], inputs, states, **STEPS[kind])
    check_found(found, expect("ssd", inputs, states, **STEPS[kind]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [("D",), ("z",), ("dt_bias",), ("D", "z")], ids=str)
def test_what_scans_may_lack(left_out, dtype):
    inputs = {name: x for name, x in draw_inputs("ssd", SIZES, dtype).items() if name not in left_out}
    check_found(call(FIRST["ssd"], inputs), expect("ssd", inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skips_by_channel(dtype):
    inputs = draw_inputs("ssd", SIZES, dtype)
    inputs["D"] = np.random.default_rng(2).standard_normal((2, 8)).astype(inputs["D"].dtype)
    check_found(call(FIRST["ssd"], inputs), expect("ssd", inputs), dtype)


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
def test_parameters_may_be_of_any_dtype(kind):
    inputs = draw_inputs("ssd", SIZES, "float32")
    for name in ("A", "D", "dt", "dt_bias", "z"):
        inputs[name] = inputs[name].astype(DTYPES[kind])
    check(call(FIRST["ssd"], inputs), expect("ssd", inputs), "float32")


@pytest.mark.parametrize("size", [1, 7, 64, 1024])
@pytest.mark.parametrize("form", [name for name in FORMS if "mamba" in name or "chunkwise" in name])
def test_chunk_sizes_change_nothing(form, size):
    inputs = draw_inputs(FORMS[form][1], SIZES, "float32")
    np.testing.assert_array_equal(call(form, inputs, chunk_size=size)[0], call(form, inputs)[0])


@pytest.mark.parametrize(("keys", "values"), [(1100, 5), (5, 1100)])
@pytest.mark.parametrize("family", FIRST)
def test_wide_heads(family, keys, values, way):
    inputs = draw_inputs(family, Sizes(1, 20, 1, 1, keys, values), "float64")
    check_found(call(FIRST[family], inputs), expect(family, inputs), "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FIRST)
def test_inputs_of_large_norm(family, dtype, way):
    sizes = Sizes(batch=1, tokens=70, keys=64, values=32)
    inputs = draw_inputs(family, sizes, dtype)
    # Not what a softmax or a quotient would make steps of.
    for name in {"v", "x", "B", "C", *(("q", "k") if family in {"gate_loop", "mlstm_siging"} else ())} & set(
        inputs
    ):
        inputs[name] = (300.0 * inputs[name].astype(np.float64)).astype(DTYPES[dtype])
    check_found(call(FIRST[family], inputs), expect(family, inputs), dtype)


@pytest.mark.parametrize("family", FIRST)
def test_the_future_has_no_influence(family, way):
    inputs, other = (draw_inputs(family, SIZES, "float32", seed=seed) for seed in (0, 5))
    clean, _ = call(FIRST[family], inputs)
    first, second = part(inputs, 0, 50), part(other, 50, 100)
    mixed = {
        name: np.concatenate([x, second[name]], axis=1) if x.ndim > 1 else x for name, x in first.items()
    }
    found, _ = call(FIRST[family], mixed)
    assert_largest_close(found[:, :50], clean[:, :50].astype(np.float64), "float32", "o")
    assert (found[:, 50:] != clean[:, 50:]).any(axis=-1).all()


@pytest.mark.parametrize("family", FIRST)
def test_nan_does_not_reach_the_past(family, way):
    inputs = draw_inputs(family, SIZES, "float32")
    clean, _ = call(FIRST[family], inputs)
    name = "x" if "x" in inputs else "v"
    inputs[name] = inputs[name].copy()
    inputs[name][:, 50:] = np.nan
    found, finals = call(FIRST[family], inputs)
    np.testing.assert_array_equal(found[:, :50], clean[:, :50])
    assert np.isnan(found[:, 50:]).all()
    assert any(np.isnan(x).all() for x in finals)


@pytest.mark.parametrize("dtype", HALF)
def test_sums_of_keys_do_not_overflow(dtype):
    # Beyond what float16 can say, until they are divided.
    inputs = draw_inputs("mlstm", Sizes(batch=1, tokens=500), dtype)
    for name, factor in (("q", 10.0), ("k", 10.0), ("v", 50.0)):
        inputs[name] = (factor * abs(inputs[name].astype(np.float64))).astype(DTYPES[dtype])
    inputs["f"] = np.full_like(inputs["f"], 10.0)
    check_found(call(FIRST["mlstm"], inputs), expect("mlstm", inputs), dtype)


def test_a_state_that_is_cleared():
    inputs = draw_inputs("mlstm", SIZES, "float32")
    inputs["f"] = np.full_like(inputs["f"], -np.inf)
    h, (c, _, _) = call(FIRST["mlstm"], inputs, draw_states("mlstm", SIZES, "float32"))
    # Every token sees itself alone.
    alone = [
        ops.mlstm_chunkwise(**{name: x.swapaxes(1, 2) for name, x in part(inputs, t, t + 1).items()})
        for t in range(100)
    ]
    assert np.isfinite(c).all()
    expected = np.concatenate([x.swapaxes(1, 2) for x in alone], axis=1)
    assert_largest_close(h, expected.astype(np.float64), "float32", "h")
