"""The oracles against transformers' own fallbacks, which compute in float32."""

import inspect

import numpy as np
import pytest

from subquad.reference import recurrent

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

B, H, HV, K, V = 2, 2, 4, 16, 8
CHUNK = 16
# One token, and two chunks and a part.
LENGTHS = (1, 37)
GENERATOR = np.random.default_rng(10)


def numbers(*shape):
    return GENERATOR.standard_normal(shape).astype(np.float32)


def decays(*shape):
    return -np.exp(numbers(*shape) - 2)


def strengths(*shape):
    return GENERATOR.random(shape).astype(np.float32)


def fallback(model, name):
    """What transformers computes where no faster library is installed."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    if not hasattr(module, name):
        pytest.skip(f"this transformers has no {name}")
    return inspect.unwrap(getattr(module, name))


def tensors(*arrays):
    return [None if x is None else torch.from_numpy(np.array(x)) for x in arrays]


def check(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-5 * max(1, float(y.abs().max())))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("has_state", [False, True])
def test_gated_delta_rule(form, length, has_state):
    function = fallback("qwen3_next", form)
    q, k, v = numbers(B, length, H, K), numbers(B, length, H, K), numbers(B, length, HV, V)
    g, beta = decays(B, length, HV), strengths(B, length, HV)
    state = numbers(B, HV, K, V) if has_state else None
    options = {"use_qk_l2norm_in_kernel": True}
    expected = function(
        *tensors(q, k, v, g, beta),
        initial_state=tensors(state)[0],
        output_final_state=True,
        chunk_size=CHUNK,
        **options,
    )
    check(recurrent.gated_delta_rule(q, k, v, g, beta, None, state, **options), expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
@pytest.mark.parametrize("has_state", [False, True])
def test_kda(form, length, has_state):
    function = fallback("kimi_linear", form)
    q, k, v = numbers(B, length, H, K), numbers(B, length, H, K), numbers(B, length, H, V)
    g, beta = decays(B, length, H, K), strengths(B, length, H)
    state = numbers(B, H, K, V) if has_state else None
    options = {"use_qk_l2norm_in_kernel": True}
    expected = function(
        *tensors(q, k, v, g, beta),
        initial_state=tensors(state)[0],
        output_final_state=True,
        chunk_size=CHUNK,
        **options,
    )
    check(recurrent.kda(q, k, v, g, beta, None, state, **options), expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("has_state", [False, True])
def test_mamba2(length, has_state):
    function = fallback("mamba2", "mamba2_chunk_scan")
    heads, groups, width, size = 4, 2, 5, 6
    x, dt, rates = numbers(B, length, heads, width), numbers(B, length, heads), decays(heads)
    b, c = numbers(B, length, groups, size), numbers(B, length, groups, size)
    skip, bias = numbers(heads), numbers(heads)
    state = numbers(B, heads, width, size) if has_state else None
    options = {"dt_softplus": True, "dt_limit": (0.2, 1.5)}
    expected = function(
        *tensors(x, dt, rates, b, c),
        chunk_size=CHUNK,
        D=tensors(skip)[0],
        dt_bias=tensors(bias)[0],
        initial_states=tensors(state)[0],
        return_final_states=True,
        **options,
    )
    found = recurrent.mamba_chunk_scan_combined(x, dt, rates, b, c, CHUNK, skip, None, bias, state, **options)
    check(found, expected)


def test_mamba2_step():
    function = fallback("mamba2", "mamba2_selective_state_update")
    heads, groups, width, size = 4, 2, 5, 6
    state, x, dt = numbers(B, heads, width, size), numbers(B, heads, width), numbers(B, heads, width)
    rates, b, c = decays(heads, width, size), numbers(B, groups, size), numbers(B, groups, size)
    skip, z, bias = numbers(heads, width), numbers(B, heads, width), numbers(heads, width)
    arguments = tensors(state, x, dt, rates, b, c)
    options = dict(zip(("D", "z", "dt_bias"), tensors(skip, z, bias), strict=True))
    out = function(*arguments, **options, dt_softplus=True)
    found = recurrent.selective_state_update(state, x, dt, rates, b, c, skip, z, bias, dt_softplus=True)
    check(found, (out, arguments[0]))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("plain", [False, True])
def test_mamba(length, plain):
    function = fallback("mamba", "mamba_selective_scan")
    channels, size = 6, 5
    u, delta, rates = numbers(B, channels, length), numbers(B, channels, length), decays(channels, size)
    b, c = numbers(B, size, length), numbers(B, size, length)
    skip, z, bias = numbers(channels), numbers(B, channels, length), numbers(channels)
    rest = (None, None, None) if plain else (skip, z, bias)
    delta = np.abs(delta) if plain else delta
    options = {"delta_softplus": not plain}
    expected = function(*tensors(u, delta, rates, b, c, *rest), return_last_state=True, **options)
    check(recurrent.selective_scan_fn(u, delta, rates, b, c, *rest, **options), expected)


def test_mamba_step():
    function = fallback("mamba", "mamba_selective_state_update")
    channels, size = 6, 5
    state, x, dt = numbers(B, channels, size), numbers(B, channels), numbers(B, channels)
    rates, b, c = decays(channels, size), numbers(B, size), numbers(B, size)
    skip, z, bias = numbers(channels), numbers(B, channels), numbers(channels)
    arguments = tensors(state, x, dt, rates, b, c)
    options = dict(zip(("D", "z", "dt_bias"), tensors(skip, z, bias), strict=True))
    out = function(*arguments, **options, dt_softplus=True)
    found = recurrent.selective_state_update(state, x, dt, rates, b, c, skip, z, bias, dt_softplus=True)
    check(found, (out, arguments[0]))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", ["lfm2", "mamba", "qwen3_next"])
@pytest.mark.parametrize("taps", [3, 4])
def test_convolution(model, length, taps):
    function = fallback(model, "causal_conv1d_fn")
    x, weight, bias = numbers(B, 6, length), numbers(6, taps), numbers(6)
    for activation in (None, "silu"):
        for shift in (None, bias):
            expected = function(*tensors(x, weight, shift), activation=activation)
            found, _ = recurrent.causal_conv1d_fn(x, weight, shift, activation=activation)
            check((found,), (expected,))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("model", ["lfm2", "mamba", "qwen3_next"])
@pytest.mark.parametrize("size", [3, 4])
def test_convolution_update(model, length, size):
    function = fallback(model, "causal_conv1d_update")
    x, state, weight, bias = numbers(B, 6, length), numbers(B, 6, size), numbers(6, 4), numbers(6)
    arguments = tensors(x, state, weight, bias)
    out = function(*arguments, activation="silu")
    check(recurrent.causal_conv1d_update(x, state, weight, bias, "silu"), (out, arguments[1]))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("has_state", [False, True])
def test_mlstm(length, has_state):
    function = fallback("xlstm", "mlstm_recurrent_sequence_native")
    q, k, v = numbers(B, length, H, K), numbers(B, length, H, K), numbers(B, length, H, V)
    i, f = numbers(B, length, H), numbers(B, length, H) + 2
    state = (numbers(B, H, K, V), numbers(B, H, K), numbers(B, H)) if has_state else None
    given = tensors(*state) if has_state else [None] * 3
    if has_state:
        given[2] = given[2][..., None]
    heads_first = (x.transpose(1, 2) for x in tensors(q, k, v, i, f))
    names = ("c_initial", "n_initial", "m_initial")
    o, (c, n, m) = function(*heads_first, **dict(zip(names, given, strict=True)), return_last_states=True)
    found, states = recurrent.mlstm(q, k, v, i, f, None, state)
    check((found, *states), (o.transpose(1, 2), c, n, m.reshape(B, H)))
