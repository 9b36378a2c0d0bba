"""Gates that are computed from what a layer gives: alone, and within the operators."""

import ml_dtypes
import numpy as np
import pytest
import torch

from subquad import ops
from subquad.ops.gates import strengths
from subquad.reference import recurrent as oracles

from .cases import DTYPES, Sizes, call, check, draw_inputs, draw_states, expect, wide


@pytest.fixture(params=["numpy", "torch"])
def library(request):
    """The libraries whose functions compute gates."""
    return request.param


def as_float64(x):
    """Returns an array of either library in float64."""
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else wide(x)


def assert_precise(found, expected, dtype):
    """Compares number by number: gates have all their digits, the small ones too."""
    assert str(found.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
    # `x` is rounded before its exponential is taken, which changes that in proportion to `x`.
    tolerance = 1e-13 if dtype == "float64" else 3e-5
    np.testing.assert_allclose(as_float64(found), expected, rtol=tolerance, atol=1e-37)


def raw(dtype, *shape):
    """What a projection gives, moderate and extreme."""
    x = np.random.default_rng(0).standard_normal(shape) * 4
    x.reshape(-1)[:10] = 0, 1e-3, -1e-3, 19.9, 20.1, -20, 80, -80, 1000, -1000
    return x.astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gate_of_the_gated_delta_rule(has_bias, dtype, library, convert):
    g = raw(dtype, 2, 9, 4)
    rates = np.log(np.array([0.1, 1, 4, 16], np.float32))
    dt_bias = np.array([-3, 0, 0.5, 2], np.float32) if has_bias else None
    given = [None if x is None else convert(library, x) for x in (g, rates, dt_bias)]
    assert_precise(ops.fused_gdn_gate(*given), oracles.gdn_gate(g, rates, dt_bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(4,), (1, 1, 4, 1), None], ids=str)
def test_gate_of_kda(shape, has_bias, lower_bound, dtype, library, convert):
    if shape is None and lower_bound is None:
        return
    g = raw(dtype, 2, 9, 4, 6)
    rates = None if shape is None else np.log(np.array([0.1, 1, 4, 16], np.float32)).reshape(shape)
    dt_bias = np.linspace(-3, 2, 24).astype(np.float32) if has_bias else None
    expected = oracles.kda_gate(g, rates, dt_bias, lower_bound)
    for bias in (dt_bias, None if dt_bias is None else dt_bias.reshape(4, 6)):
        given = [None if x is None else convert(library, x) for x in (g, rates, bias)]
        assert_precise(ops.fused_kda_gate(*given, lower_bound), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoids(dtype, library, convert):
    beta = raw(dtype, 2, 9, 4)
    x = wide(beta)
    for doubled in (False, True):
        found = strengths(convert(library, beta), use_beta_sigmoid_in_kernel=True, allow_neg_eigval=doubled)
        with np.errstate(over="ignore"):
            assert_precise(found, (1 + doubled) / (1 + np.exp(-x)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_of_gates(dtype, library, convert):
    g, rates = raw(dtype, 3, 4), np.zeros(4, np.float32)
    given = convert(library, g), convert(library, rates)
    of = {"numpy": (np.float64, np.float16, ml_dtypes.bfloat16)}
    for wanted in of.get(library, (torch.float64, torch.float16, torch.bfloat16)):
        assert ops.fused_gdn_gate(*given, output_dtype=wanted).dtype == wanted
        assert ops.fused_kda_gate(given[0], lower_bound=-5.0, output_dtype=wanted).dtype == wanted
    # Half parameters beside float32 projections, and the reverse.
    narrow = convert(library, rates.astype(np.float16))
    np.testing.assert_array_equal(
        as_float64(ops.fused_gdn_gate(given[0], narrow)), as_float64(ops.fused_gdn_gate(*given))
    )


def test_gates_have_gradients():
    g = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rates = torch.randn(4, dtype=torch.float64, requires_grad=True)
    dt_bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.fused_gdn_gate, (g, rates, dt_bias))
    for bound in (None, -5.0):
        assert torch.autograd.gradcheck(
            lambda g, rates, dt_bias, bound=bound: ops.fused_kda_gate(g[..., None], rates, dt_bias, bound),
            (g, rates, dt_bias),
        )


WITH_GATES = [
    f"{prefix} {family}"
    for prefix, family in (
        ("chunk_gated_delta_rule", "gated_delta_rule"),
        ("fused_recurrent_gated_delta_rule", "gated_delta_rule"),
        ("chunk_kda", "kda"),
        ("fused_recurrent_kda", "kda"),
    )
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("form", WITH_GATES)
def test_gates_within_operators(form, lower_bound, doubled, dtype, library, convert, convert_all):
    family = form.partition(" ")[2]
    if family != "kda" and lower_bound is not None:
        return
    sizes = Sizes(tokens=40, heads=2, value_heads=4)
    inputs = draw_inputs(family, sizes, dtype)
    states = draw_states(family, sizes, dtype)
    for name in ("g", "beta"):
        drawn = np.random.default_rng(2).standard_normal(inputs[name].shape) * 2
        inputs[name] = drawn.astype(DTYPES[dtype])
    count = 4 if family == "gated_delta_rule" else 4 * sizes.keys
    parameters = {
        "A_log": np.log(np.array([0.1, 1, 4, 16], np.float32)),
        "dt_bias": np.linspace(-2, 2, count).astype(np.float32),
    }
    options = {
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": doubled,
        "use_qk_l2norm_in_kernel": True,
    }
    if lower_bound is not None:
        options["lower_bound"] = lower_bound
    expected = expect(family, inputs, states, **parameters, **options)
    found = call(
        form, convert_all(library, {**inputs, **parameters}), convert_all(library, states), **options
    )
    check(found, expected, dtype)


@pytest.mark.parametrize("form", WITH_GATES)
def test_parameters_have_no_effect_without_a_gate(form):
    family = form.partition(" ")[2]
    inputs = draw_inputs(family, Sizes(), "float32")
    expected, _ = call(form, inputs)
    found, _ = call(form, inputs, A_log=np.zeros(2, np.float32), dt_bias=np.zeros(2, np.float32))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decays_of_heads_and_channels_multiply(dtype):
    inputs = draw_inputs("gated_delta_rule", Sizes(), dtype)
    inputs["gk"] = draw_inputs("kda", Sizes(), dtype)["g"]
    form = "fused_recurrent_gated_delta_rule gated_delta_rule"
    check(call(form, inputs), expect("gated_delta_rule", inputs), dtype)
    alone = {name: x for name, x in inputs.items() if name != "g"}
    check(call(form, alone), expect("gated_delta_rule", alone), dtype)
