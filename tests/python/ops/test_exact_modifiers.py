"""Soft-cap, ALiBi, relative bias, sinks, scales of queries and of lengths: every shape and dtype, few queries and many."""

import numpy as np
import pytest

import subquad
from subquad import masks

FORMS = {"many": (70, 110), "more queries": (50, 33), "few": (2, 700), "one": (1, 65)}
B, H = 2, 4


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return draw(dtype, B, queries, H, 32), draw(dtype, B, keys, 2, 32), draw(dtype, B, keys, 2, 20)


@pytest.fixture
def accumulator(dtype):
    """The dtype of scores."""
    return "float64" if dtype == "float64" else "float32"


@pytest.fixture
def size(form):
    """Spells a shape by its axes."""
    sizes = {"b": B, "h": H, "q": form[0], "d": sum(form) - 1, "n": form[1] + 1, "1": 1}
    return lambda axes: tuple(sizes[axis] for axis in axes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cap", [0.3, 5.0, 50.0, 1e30])
def test_softcap(cap, causal, inputs, check_attention):
    check_attention(*inputs, softcap=cap, causal=causal, scale=0.4, scores=30.0)


def test_softcap_bounds_large_scores(inputs, check_attention):
    check_attention(*inputs, softcap=20.0, scale=50.0, scores=20.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", ["h", "bh"])
def test_alibi(axes, causal, inputs, size, draw, check_attention):
    slopes = np.abs(draw("float32", *size(axes))) / 8
    check_attention(*inputs, alibi_slopes=slopes, causal=causal, scores=20.0 + 0.5 * inputs[1].shape[1])


def test_slopes_of_zero_change_nothing(inputs, check_attention):
    options = {"alibi_slopes": np.zeros(H, np.float32), "causal": True}
    check_attention(*inputs, scores=20.0, **options)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", ["hd", "1d"])
def test_relative_bias(axes, causal, own, inputs, size, dtype, accumulator, draw, check_attention):
    biases = draw(dtype if own else accumulator, *size(axes))
    check_attention(*inputs, relative_bias=biases, causal=causal, scores=20.0)


def test_relative_bias_is_its_dense_form(inputs, size, form, accumulator, draw):
    biases = draw(accumulator, *size("hd"))
    queries, keys = form
    dense = biases[:, np.arange(keys) - np.arange(queries)[:, None] + queries - 1]
    found = subquad.attention(*inputs, relative_bias=biases).astype(np.float64)
    expected = subquad.attention(*inputs, bias=dense).astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


def test_infinite_relative_bias_hides(inputs, size, form, accumulator, dtype, check_attention):
    biases = np.zeros(size("1d"), accumulator)
    # The distances that a window of 3 keys would hide.
    distance = np.arange(sum(form) - 1) - (form[1] - 1)
    biases[:, (distance > 0) | (distance < -2)] = -np.inf
    out, lse = subquad.attention(*inputs, relative_bias=biases, return_lse=True)
    expected, expected_lse = subquad.attention(*inputs, window_size=(2, 0), return_lse=True)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), expected.astype(np.float64), rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", ["h", "hq", "1q", "h1", "1hq", "b1q", "bh1", "bhq", "1h1", "111"])
def test_sinks(axes, causal, own, inputs, size, dtype, accumulator, draw, check_attention):
    sinks = draw(dtype if own else accumulator, *size(axes), width=2)
    out = np.full((*inputs[0].shape[:3], 20), np.nan, inputs[0].dtype)
    check_attention(*inputs, sinks=sinks, causal=causal, scores=20.0, out=out)


@pytest.mark.parametrize("sink", [-1e4, 8.0, 1e4])
def test_sinks_of_any_size(sink, inputs, accumulator, check_attention):
    check_attention(*inputs, sinks=np.full(H, sink, accumulator), causal=True, scores=20.0)


def test_no_sink_is_minus_infinity(inputs, accumulator):
    found = subquad.attention(*inputs, sinks=np.full(H, -np.inf, accumulator), causal=True, return_lse=True)
    expected = subquad.attention(*inputs, causal=True, return_lse=True)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_rows_without_keys_have_the_sink_alone(dtype, accumulator, draw):
    q, k, v = draw(dtype, 1, 5, H, 8), draw(dtype, 1, 3, 2, 8), draw(dtype, 1, 3, 2, 8)
    sinks = np.arange(H, dtype=accumulator)
    for options in ({"causal": True}, {"mask": masks.padding(0)}, {"bias": np.zeros((5, 3), bool)}):
        out, lse = subquad.attention(q, k, v, sinks=sinks, return_lse=True, **options)
        rows = 2 if "causal" in options else 5
        assert (out[:, :rows].astype(np.float64) == 0).all()
        np.testing.assert_array_equal(lse[0, :, :rows], np.broadcast_to(sinks[:, None], (H, rows)))
    out, lse = subquad.attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True)
    assert (out.astype(np.float64) == 0).all()
    np.testing.assert_array_equal(lse[0], np.broadcast_to(sinks[:, None], (H, 5)))


@pytest.mark.parametrize("of", ["accumulator", "own", "float64", "float32"])
@pytest.mark.parametrize("axes", ["q", "h1", "hq", "b11", "1hq", "bhq", "1"])
def test_scales(axes, of, inputs, size, dtype, accumulator, draw, check_attention):
    scales = draw({"accumulator": accumulator, "own": dtype}.get(of, of), *size(axes)) / 4
    check_attention(*inputs, scale=scales, causal=True, scores=20.0)


def test_scales_of_one_number_are_that_number(inputs, accumulator):
    expected = subquad.attention(*inputs, scale=0.25)
    for shape in ((1,), (1, 1, 1), (H, 1), (B, 1, 1)):
        found = subquad.attention(*inputs, scale=np.full(shape, 0.25, accumulator))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (7, 2)},
        {"mask": masks.padding([30, 20], [3, 0]), "causal": True},
        {"window_size": [(0, 0), (9, 0), (None, None), (3, 3)], "causal": True},
    ],
    ids=str,
)
def test_length_scale(options, inputs, size, accumulator, draw, check_attention):
    factors = draw(accumulator, *size("n"))
    check_attention(*inputs, length_scale=factors, scores=60.0, **options)


def test_length_scale_does_not_count_the_bias(inputs, size, form, accumulator, check_attention):
    factors = np.log(np.arange(size("n")[0], dtype=accumulator) + 1)
    bias = np.random.default_rng(3).random(form) > 0.5
    check_attention(*inputs, length_scale=factors, bias=bias, causal=True, scores=60.0)


def test_length_scale_and_scale_multiply(inputs, size, dtype, draw, check_attention):
    factors, scales = np.abs(draw(dtype, *size("n"))), draw("float32", *size("h1")) / 5
    check_attention(*inputs, length_scale=factors, scale=scales, causal=True, scores=60.0)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_arrays_of_every_library(library, dtype, draw, convert):
    arrays = [draw(dtype, B, 20, H, 16), draw(dtype, B, 30, 2, 16), draw(dtype, B, 30, 2, 8)]
    options = {
        "scale": draw("float32", H, 1),
        "relative_bias": draw("float32", H, 49),
        "alibi_slopes": draw("float32", B, H),
        "sinks": draw("float32", H),
        "length_scale": draw("float32", 31),
        "window_size": np.array([[3, 0], [5, 5], [-1, 2], [0, -1]]),
    }
    if dtype == "float64":
        options["relative_bias"], options["sinks"] = (
            options["relative_bias"].astype("f8"),
            options["sinks"].astype("f8"),
        )
    expected = subquad.attention(*arrays, **options)
    found = subquad.attention(
        *(convert(library, x) for x in arrays), **{name: convert(library, x) for name, x in options.items()}
    )
    assert type(found) is type(convert(library, arrays[0]))
    found = found.double().numpy() if library == "torch" else np.asarray(found).astype(np.float64)
    np.testing.assert_array_equal(found, expected.astype(np.float64))


def test_arrays_of_any_strides(dtype, accumulator, draw):
    q, k, v = draw(dtype, B, 20, H, 16), draw(dtype, B, 30, 2, 16), draw(dtype, B, 30, 2, 8)
    options = {
        "scale": draw(accumulator, B, H, 20),
        "relative_bias": draw(accumulator, H, 49),
        "alibi_slopes": draw("float32", B, H),
        "sinks": draw(accumulator, B, H, 20),
        "length_scale": draw(accumulator, 31),
    }
    expected = subquad.attention(q, k, v, **options)
    for name, array in options.items():
        read_only = array.copy()
        read_only.flags.writeable = False
        for view in (
            np.asfortranarray(array),
            np.repeat(array, 2, axis=-1)[..., ::2],
            array[..., ::-1].copy()[..., ::-1],
            read_only,
        ):
            found = subquad.attention(q, k, v, **options | {name: view})
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("queries", [1, 4, 50])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_hidden_keys_do_not_leak(bad, queries, dtype, accumulator, draw, check_attention):
    q, k, v = draw(dtype, 1, queries, 4, 16), draw(dtype, 1, 80, 2, 16), draw(dtype, 1, 80, 2, 8)
    clean = q, k.copy(), v.copy()
    # Far from every window.
    k[:, :5], v[:, :5] = bad, bad
    check_attention(
        q,
        k,
        v,
        clean=clean,
        window_size=(20, 0),
        softcap=3.0,
        alibi_slopes=np.full(4, 0.1, np.float32),
        sinks=np.ones(4, accumulator),
        relative_bias=draw(accumulator, 4, queries + 79),
        scale=draw(accumulator, queries) / 4,
        scores=20.0,
    )
