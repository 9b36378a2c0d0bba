"""Gradients through soft-cap, ALiBi, biases, sinks, scales of queries and of lengths, and of these arguments themselves."""

import numpy as np
import pytest

import subquad
from subquad import masks

FORMS = {"many": (40, 70), "more queries": (50, 33), "few": (2, 300), "one": (1, 65)}
# Where biases and sinks are of the inputs' dtype, and keys are hidden.
OWN = (FORMS["more queries"], FORMS["few"])
B, H = 2, 4


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`do`, `q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return (
        draw(dtype, B, queries, H, 20),
        draw(dtype, B, queries, H, 16),
        draw(dtype, B, keys, 2, 16),
        draw(dtype, B, keys, 2, 20),
    )


@pytest.fixture
def accumulator(dtype):
    """The dtype of scores."""
    return "float64" if dtype == "float64" else "float32"


@pytest.fixture
def size(form):
    """Spells a shape by its axes."""
    sizes = {"b": B, "h": H, "q": form[0], "k": form[1], "d": sum(form) - 1, "n": form[1] + 1, "1": 1}
    return lambda axes: tuple(sizes[axis] for axis in axes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cap", [0.3, 5.0, 1e30])
def test_softcap(cap, causal, inputs, check_backward):
    check_backward(*inputs, softcap=cap, causal=causal, scale=0.4)


def test_softcap_of_large_scores(inputs, check_backward):
    check_backward(*inputs, softcap=20.0, scale=5.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", ["h", "bh"])
def test_alibi(axes, causal, inputs, size, draw, check_backward):
    slopes = np.abs(draw("float32", *size(axes))) / 8
    found = check_backward(*inputs, alibi_slopes=slopes, causal=causal)
    assert (found["alibi_slopes"] != 0).all()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("axes", ["hd", "1d"])
def test_relative_bias(axes, own, inputs, size, dtype, accumulator, draw, check_backward):
    biases = draw(dtype if own else accumulator, *size(axes))
    check_backward(*inputs, relative_bias=biases)
    # Distances that a mask hides in all of their places have no gradient.
    found = check_backward(*inputs, relative_bias=biases, window_size=(3, 0))
    distance = np.arange(size("d")[0]) - (size("k")[0] - 1)
    assert (found["relative_bias"][:, (distance < -3) | (distance > 0)].astype(float) == 0).all()


@pytest.mark.parametrize(
    "axes",
    ["bhqk", "bh1k", "b1qk", "1hqk", "11qk", "1h1k", "bhq1", "1111", "hqk", "h11", "qk", "q1", "k", ""],
)
def test_bias(axes, form, inputs, size, dtype, accumulator, draw, check_backward):
    bias = np.asarray(draw(dtype if form in OWN else accumulator, *size(axes)))
    found = check_backward(*inputs, bias=bias, causal=form in OWN)
    assert found["bias"].shape == bias.shape


def test_expanded_bias_has_a_gradient_of_its_whole_shape(inputs, size, accumulator, draw):
    do, *rest = inputs
    bias = np.broadcast_to(draw(accumulator, *size("b11k")), size("bhqk"))
    results = subquad.attention(*rest, bias=bias, return_lse=True)
    (wide,) = subquad.attention_backward(do, *rest, *results, wrt=["bias"], bias=bias)
    (narrow,) = subquad.attention_backward(do, *rest, *results, wrt=["bias"], bias=bias[:, :1, :1])
    assert wide.shape == size("bhqk")
    summed = wide.sum(axis=(1, 2), keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(narrow, summed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", ["h", "hq", "1q", "h1", "b1q", "bh1", "bhq", "111"])
def test_sinks(axes, form, inputs, size, dtype, accumulator, draw, check_backward):
    sinks = draw(dtype if form in OWN else accumulator, *size(axes), width=2)
    check_backward(*inputs, sinks=sinks, causal=form in OWN)


@pytest.mark.parametrize("sink", [-1e4, 8.0, 1e4, -np.inf])
def test_sinks_of_any_size(sink, inputs, accumulator, check_backward):
    found = check_backward(*inputs, sinks=np.full(H, sink, accumulator), causal=True)
    if sink == -np.inf:
        assert (found["sinks"] == 0).all()


def test_sinks_of_rows_without_keys(inputs, size, accumulator, dtype, draw, check_backward):
    sinks, dlse = draw(accumulator, *size("bhq")), draw(accumulator, *size("bhq"))
    found = check_backward(*inputs, sinks=sinks, mask=masks.padding(0), dlse=dlse)
    # The log-sum-exp is the sink.
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(found["sinks"], dlse, rtol=tolerance, atol=0)
    assert all((found[name].astype(float) == 0).all() for name in "qkv")


@pytest.mark.parametrize("of", ["accumulator", "own"])
@pytest.mark.parametrize("axes", ["q", "h1", "b11", "1hq", "bhq", "1"])
def test_scales(axes, of, inputs, size, dtype, accumulator, draw, check_backward):
    scales = draw({"accumulator": accumulator, "own": dtype}[of], *size(axes)) / 4
    check_backward(*inputs, scale=scales, causal=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (7, 2)},
        {"mask": masks.padding([30, 20], [3, 0]), "causal": True},
        {"window_size": [(0, 0), (9, 0), (None, None), (3, 3)], "scale": 0.1},
    ],
    ids=str,
)
def test_length_scale(options, inputs, size, accumulator, draw, check_backward):
    check_backward(*inputs, length_scale=draw(accumulator, *size("n")), **options)


def test_all_together(inputs, size, accumulator, draw, check_backward):
    check_backward(
        *inputs,
        dlse=draw(accumulator, *size("bhq")),
        causal=True,
        window_size=(40, 0),
        mask=masks.padding([33, 25]) | masks.prefix(9),
        scale=draw(accumulator, *size("h1")) / 3,
        bias=draw(accumulator, *size("1hqk")),
        relative_bias=draw(accumulator, *size("hd")),
        softcap=4.0,
        alibi_slopes=np.abs(draw("float32", *size("bh"))) / 8,
        sinks=draw(accumulator, *size("hq")),
        length_scale=np.log1p(np.arange(size("n")[0])).astype(accumulator),
    )


@pytest.mark.parametrize("library", ["torch", "jax", "dlpack"])
def test_arrays_of_every_library(library, dtype, accumulator, draw, convert):
    arrays = [draw(dtype, B, 20, H, 8), draw(dtype, B, 20, H, 16), draw(dtype, B, 30, 2, 16)]
    arrays.append(draw(dtype, B, 30, 2, 8))
    options = {
        "dlse": draw(accumulator, B, H, 20),
        "scale": draw(accumulator, H, 1),
        "bias": draw(accumulator, 20, 30),
        "relative_bias": draw(accumulator, H, 49),
        "alibi_slopes": draw("float32", B, H),
        "sinks": draw(accumulator, H),
        "length_scale": draw(accumulator, 31),
        "window_size": [(3, 0), (5, 5), (None, 2), (0, None)],
    }
    forward = {name: x for name, x in options.items() if name != "dlse"}
    arrays += subquad.attention(*arrays[1:], return_lse=True, **forward)
    wrt = ("q", "k", "v", "bias", "relative_bias", "alibi_slopes", "sinks")
    if library == "dlpack" and dtype == "bfloat16":
        pytest.skip("NumPy, which makes the results for other libraries, has no bfloat16")
    expected = subquad.attention_backward(*arrays, wrt=wrt, **options)
    given = {name: convert(library, x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    found = subquad.attention_backward(*(convert(library, x) for x in arrays), wrt=wrt, **given)
    for x, y in zip(found, expected, strict=True):
        assert type(x) is (np.ndarray if library == "dlpack" else type(convert(library, arrays[0])))
        wide = x.double().numpy() if library == "torch" else np.asarray(x).astype(np.float64)
        np.testing.assert_array_equal(wide, y.astype(np.float64))
