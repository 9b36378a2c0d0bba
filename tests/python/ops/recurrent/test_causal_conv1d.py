"""Short convolutions against the oracle: every feature, both ways in memory, states, and what is refused."""

import inspect
from itertools import pairwise

import numpy as np
import pytest

import subquad
from subquad import ops
from subquad.reference import recurrent as oracle

from .cases import DTYPES

# Of what is rounded once, relative to the largest of a sum of a few products.
TOLERANCES = {"float64": 1e-13, "float32": 3e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}
B, D, T = 2, 19, 37


def draw(dtype, *shape, seed=0):
    generator = np.random.default_rng([seed, *shape])
    return generator.standard_normal(shape).astype(DTYPES[dtype])


def check(found, expected, dtype):
    found, expected = np.asarray(found).astype(np.float64), np.asarray(expected)
    assert found.shape == expected.shape
    limit = TOLERANCES[dtype] * np.maximum(np.abs(expected), 1.0)
    assert (np.abs(found - expected) <= limit).all(), np.max(np.abs(found - expected))


def channels_last(x):
    """The same `[B, D, T]` with the channels contiguous."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def apart(x):
    """With no axis that is contiguous."""
    whole = np.full([2 * n for n in x.shape], np.nan, x.dtype)
    whole[::2, ::2, ::2] = x
    return whole[::2, ::2, ::2]


def backwards(x):
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


LAYOUTS = {"tokens": np.ascontiguousarray, "channels": channels_last, "apart": apart, "backwards": backwards}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(layout, taps, dtype):
    x, weight, bias = draw(dtype, B, D, T), draw(dtype, D, taps), draw(dtype, D)
    states = draw(dtype, B, D, taps - 1)
    given = LAYOUTS[layout](x)
    for activation in (None, "silu", "swish"):
        arguments = (weight, bias, None, states)
        expected, last = oracle.causal_conv1d_fn(x, *arguments, activation=activation)
        out, found = ops.causal_conv1d_fn(given, *arguments, return_final_states=True, activation=activation)
        check(out, expected, dtype)
        assert (out.dtype, found.dtype) == (x.dtype, x.dtype)
        np.testing.assert_array_equal(found.astype(np.float64), last)
        plain = ops.causal_conv1d_fn(given, weight, activation=activation)
        check(plain, oracle.causal_conv1d_fn(x, weight, activation=activation)[0], dtype)
    assert (layout == "channels") == (out.strides[1] == out.itemsize)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 15, 16, 17, 100, 1500])
@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_lengths(layout, length):
    x, weight, states = draw("float32", 1, 3, length), draw("float32", 3, 4), draw("float32", 1, 3, 3)
    expected, last = oracle.causal_conv1d_fn(x, weight, None, None, states, activation="silu")
    out, found = ops.causal_conv1d_fn(LAYOUTS[layout](x), weight, None, None, states, True, None, "silu")
    check(out, expected, "float32")
    np.testing.assert_array_equal(found, last)


@pytest.mark.parametrize(("batch", "channels", "length"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_nothing(layout, batch, channels, length):
    x, weight = LAYOUTS[layout](draw("float32", batch, channels, length)), draw("float32", channels, 4)
    out, states = ops.causal_conv1d_fn(x, weight, return_final_states=True)
    assert (out.shape, states.shape) == (x.shape, (batch, channels, 3))
    assert (states == 0).all()
    assert ops.causal_conv1d_update(x, states, weight).shape == x.shape


@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("taps", [1, 3, 4, 9])
def test_sequences_by_number(taps, layout):
    x, weight, bias = draw("float64", 3, 18, 12), draw("float64", 18, taps), draw("float64", 18)
    states = draw("float64", 3, 18, taps - 1)
    numbers = np.array(
        [
            [0, 0, 0, 1, 1, 5, 5, 5, 5, 5, 5, 5],
            [3, 3, 3, 3, -1, -1, 4, 4, 4, 4, 4, 9],
            [-1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        ]
    )
    for kind in (np.int32, np.int64):
        arguments = (weight, bias, numbers.astype(kind), states)
        expected, last = oracle.causal_conv1d_fn(x, *arguments, activation="silu")
        out, found = ops.causal_conv1d_fn(LAYOUTS[layout](x), *arguments, True, activation="silu")
        check(out, expected, "float64")
        np.testing.assert_array_equal(found, last)
        tokens_first, _ = ops.causal_conv1d(
            LAYOUTS[layout](x).swapaxes(1, 2), weight, bias, activation="silu", seq_idx=numbers.astype(kind)
        )
        check(
            tokens_first.swapaxes(1, 2),
            oracle.causal_conv1d_fn(x, *arguments[:3], activation="silu")[0],
            "float64",
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("lengths", [None, (5, 0, 1, 20, 2)], ids=["rows", "packed"])
@pytest.mark.parametrize("contiguous", ["tokens", "channels"])
def test_the_form_of_flash_linear_attention(contiguous, lengths, taps, dtype):
    batch, count = (B, B) if lengths is None else (1, len(lengths))
    length = T if lengths is None else sum(lengths)
    bounds = None if lengths is None else np.cumsum([0, *lengths])
    x, residual = draw(dtype, batch, D, length), draw(dtype, batch, length, D, seed=1)
    weight, bias = draw(dtype, D, taps), draw(dtype, D)
    states = draw(dtype, count, D, taps)
    given = LAYOUTS[contiguous](x).swapaxes(1, 2)
    expected, _ = oracle.causal_conv1d_fn(
        x, weight, bias, None, states[..., 1:], activation="silu", cu_seqlens=bounds
    )
    out, last = ops.causal_conv1d(
        given, weight, bias, residual, states, True, "silu", cu_seqlens=bounds, backend="cuda"
    )
    check(out, expected.swapaxes(1, 2) + residual.astype(np.float64), dtype)
    for n in range(count):
        row = x[n] if bounds is None else x[0][:, bounds[n] : bounds[n + 1]]
        np.testing.assert_array_equal(last[n], np.concatenate([states[n], row], axis=-1)[:, -taps:])
    out, last = ops.causal_conv1d(given, weight, cu_seqlens=bounds)
    check(out, oracle.causal_conv1d_fn(x, weight, cu_seqlens=bounds)[0].swapaxes(1, 2), dtype)
    assert last is None


def test_axes_that_make_up_the_channels():
    x, weight = draw("float32", 2, 5, 12), draw("float32", 12, 4)
    expected, states = ops.causal_conv1d(x, weight, None, x, output_final_state=True)
    folded = x.reshape(2, 5, 3, 4)
    out, found = ops.causal_conv1d(folded, weight, None, folded, output_final_state=True)
    np.testing.assert_array_equal(out, expected.reshape(folded.shape))
    np.testing.assert_array_equal(found, states)


@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_and_states_of_sums(dtype):
    wide = "float64" if dtype == "float64" else "float32"
    x, weight, bias, states = draw(dtype, B, D, T), draw(wide, D, 4), draw(wide, D), draw(wide, B, D, 3)
    out = ops.causal_conv1d_fn(x, weight, bias, None, states, activation="silu")
    check(out, oracle.causal_conv1d_fn(x, weight, bias, None, states, activation="silu")[0], dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_final_states_are_written_where_they_are_asked_for(layout):
    x, weight = draw("float32", B, D, T), draw("float32", D, 4)
    into = np.full((B, D, 3), np.nan, np.float32)
    into = into if layout == "backwards" else LAYOUTS[layout](into)
    _, states = ops.causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=into)
    assert states is into
    np.testing.assert_array_equal(into, x[..., -3:])


@pytest.mark.parametrize("library", ["torch", "jax", "dlpack"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_libraries(dtype, library, convert):
    x, weight, bias, states = draw(dtype, B, D, T), draw(dtype, D, 4), draw(dtype, D), draw(dtype, B, D, 3)
    arrays = [convert(library, one) for one in (x, weight, bias, states)]
    out, last = ops.causal_conv1d_fn(*arrays[:3], None, arrays[3], True, activation="silu")
    expected, expected_last = ops.causal_conv1d_fn(x, weight, bias, None, states, True, activation="silu")
    if library != "dlpack":
        assert type(out) is type(last) is type(arrays[0])
    for found, wanted in ((out, expected), (last, expected_last)):
        plain = found.double().numpy() if library == "torch" else np.asarray(found).astype(np.float64)
        np.testing.assert_array_equal(plain, wanted.astype(np.float64))


@pytest.mark.parametrize("layout", ["tokens", "channels"])
def test_threads_do_not_change_bits(layout, keep_num_threads):
    x, weight = LAYOUTS[layout](draw("float32", 1, 300, 700)), draw("float32", 300, 4)
    found = []
    for threads in (1, 2, 3):
        subquad.set_num_threads(threads)
        found.append(ops.causal_conv1d_fn(x, weight, None, None, None, True, activation="silu"))
    for out, states in found[1:]:
        np.testing.assert_array_equal(out, found[0][0])
        np.testing.assert_array_equal(states, found[0][1])


def test_what_is_not_finite_stays_in_its_sequence():
    x, weight = draw("float32", 1, D, 12), draw("float32", D, 4)
    x[..., 4:8] = np.nan
    bounds, numbers = np.array([0, 4, 8, 12]), np.array([[0] * 4 + [-1] * 4 + [2] * 4])
    for layout in ("tokens", "channels"):
        given = LAYOUTS[layout](x)
        packed, _ = ops.causal_conv1d(given.swapaxes(1, 2), weight, cu_seqlens=bounds)
        out = ops.causal_conv1d_fn(given, weight, seq_idx=numbers)
        for found in (packed.swapaxes(1, 2), out):
            assert np.isfinite(found[..., [0, 1, 2, 3, 8, 9, 10, 11]]).all()
        assert np.isnan(packed[:, 4:8]).all()
        assert (out[..., 4:8] == 0).all()


# Updates.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("room", [0, 1, 5])
@pytest.mark.parametrize("cuts", [range(8), [0, 3, 4, 7], [0, 7]], ids=["single", "some", "all"])
def test_updates(cuts, room, taps, dtype):
    x, weight, bias = draw(dtype, B, D, 7), draw(dtype, D, taps), draw(dtype, D)
    state = draw(dtype, B, D, taps - 1 + room)
    for start, end in pairwise(cuts):
        part = x[..., start:end]
        expected, moved = oracle.causal_conv1d_update(part, state, weight, bias, "silu")
        out = ops.causal_conv1d_update(part, state, weight, bias, "silu")
        check(out, expected, dtype)
        np.testing.assert_array_equal(state.astype(np.float64), moved)


@pytest.mark.parametrize("layout", ["tokens", "channels", "apart"])
@pytest.mark.parametrize("circular", [False, True])
def test_updates_choose_their_states(circular, layout):
    x, weight, rows = draw("float32", 3, D, 2), draw("float32", D, 4), np.array([4, -1, 2])
    counts = np.array([7, 8, 30], np.int32) if circular else None
    pool = LAYOUTS[layout](draw("float32", 5, D, 6))
    before = pool.copy()
    expected, moved = oracle.causal_conv1d_update(x, before, weight, None, None, counts, rows)
    out = ops.causal_conv1d_update(
        LAYOUTS[layout](x), pool, weight, None, None, counts, rows.astype(np.int32)
    )
    check(out, expected, "float32")
    np.testing.assert_array_equal(pool, moved)


@pytest.mark.parametrize("size", [3, 5, 16])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_circular_states(length, size):
    x, weight = draw("float64", B, D, length), draw("float64", D, 4)
    state, counts = draw("float64", B, D, size), np.array([2, 11])
    expected, moved = oracle.causal_conv1d_update(x, state, weight, None, "swish", counts)
    check(ops.causal_conv1d_update(x, state, weight, None, "swish", counts), expected, "float64")
    np.testing.assert_array_equal(state, moved)


def test_an_update_may_have_no_axis_of_tokens():
    x, weight, state = draw("float32", B, D), draw("float32", D, 4), draw("float32", B, D, 4)
    again = state.copy()
    out = ops.causal_conv1d_update(x, state, weight)
    np.testing.assert_array_equal(out, ops.causal_conv1d_update(x[..., None], again, weight)[..., 0])
    np.testing.assert_array_equal(state, again)


def test_updates_continue_a_prompt():
    x, weight, bias = draw("float32", B, D, T), draw("float32", D, 4), draw("float32", D)
    whole = ops.causal_conv1d_fn(x, weight, bias, activation="silu")
    out, state = ops.causal_conv1d_fn(x[..., :20], weight, bias, return_final_states=True, activation="silu")
    parts = [out] + [
        ops.causal_conv1d_update(x[..., t : t + 1], state, weight, bias, "silu") for t in range(20, T)
    ]
    check(np.concatenate(parts, axis=-1), whole.astype(np.float64), "float32")


# What is refused.


def inputs():
    return {"x": draw("float32", B, D, T), "weight": draw("float32", D, 4)}


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("x", draw("float32", D, T), ValueError, r"expected shape of rank 3, \[B, D, T\], got \(19, 37\)"),
        ("x", draw("float32", B, D, T).astype(np.int32), TypeError, "expected dtype"),
        ("x", "x", TypeError, "expected a PyTorch tensor"),
        ("weight", None, TypeError, "expected a PyTorch tensor"),
        ("weight", draw("float32", D), ValueError, r"expected shape \(19, W\)"),
        ("weight", draw("float32", D + 1, 4), ValueError, r"expected shape \(19, W\)"),
        ("weight", draw("float32", D, 0), ValueError, r"expected shape \(19, W\)"),
        ("weight", draw("float64", D, 4), TypeError, "expected dtype float32, got float64"),
        ("weight", draw("float32", D, 1025), NotImplementedError, "a filter of 1025 taps is not supported"),
        ("bias", draw("float32", D, 1), ValueError, r"expected shape \(19,\), got \(19, 1\)"),
        ("bias", draw("float16", D), TypeError, "expected dtype float32, got float16"),
        ("seq_idx", np.zeros((B, T - 1), np.int32), ValueError, r"expected shape \(2, 37\)"),
        ("seq_idx", np.zeros((B, T)), TypeError, "expected dtype int32 or int64"),
        ("initial_states", draw("float32", B, D, 4), ValueError, r"expected shape \(2, 19, 3\)"),
        ("initial_states", draw("float16", B, D, 3), TypeError, "expected dtype float32, got float16"),
        ("final_states_out", draw("float32", B, D, 4), ValueError, r"expected shape \(2, 19, 3\)"),
        ("final_states_out", draw("float64", B, D, 3), TypeError, "expected dtype float32"),
        ("activation", "gelu", ValueError, "expected None, 'silu' or 'swish', got 'gelu'"),
    ],
)
def test_bad_input(name, wrong, error, message):
    with pytest.raises(error, match=rf"^{name}: {message}"):
        ops.causal_conv1d_fn(**{**inputs(), name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("weight", None, TypeError, "expected a PyTorch tensor"),
        (
            "residual",
            draw("float32", B, D, T),
            ValueError,
            r"expected shape \(2, 37, 19\) as x has, got \(2, 19, 37\)",
        ),
        ("residual", draw("float64", B, T, D), TypeError, "expected dtype"),
        ("initial_state", draw("float32", B, D, 3), ValueError, r"expected shape \(2, 19, 4\)"),
        ("backend", "cpu", ValueError, "expected 'triton', 'cuda' or 'mix', got 'cpu'"),
        ("cp_context", object(), NotImplementedError, "object is not supported"),
        ("reverse", True, TypeError, "expected no such argument, got bool"),
        ("x", draw("float32", T, D), ValueError, r"expected shape of rank 3, \[B, T, D\]"),
    ],
)
def test_bad_input_of_the_other_form(name, wrong, error, message):
    given = {"x": draw("float32", B, T, D), "weight": draw("float32", D, 4)}
    with pytest.raises(error, match=rf"^{name}: {message}"):
        ops.causal_conv1d(**{**given, name: wrong})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, T], "expected a first element of 0"),
        ([0, 5, 3, T], "expected numbers that do not decrease"),
        ([0, T - 1], "expected a last element of 37"),
    ],
)
def test_bad_bounds(bounds, message):
    x, weight = draw("float32", 1, T, D), draw("float32", D, 4)
    with pytest.raises(ValueError, match=rf"^cu_seqlens: {message}"):
        ops.causal_conv1d(x, weight, cu_seqlens=np.array(bounds))
    with pytest.raises(ValueError, match=rf"^x: expected shape \(1, {T}, {D}\), as cu_seqlens is given"):
        ops.causal_conv1d(draw("float32", B, T, D), weight, cu_seqlens=np.array([0, T]))
    with pytest.raises(ValueError, match=r"^seq_idx: expected None, as cu_seqlens is given"):
        ops.causal_conv1d(x, weight, cu_seqlens=np.array([0, T]), seq_idx=np.zeros((1, T), np.int32))


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("x", draw("float32", D), ValueError, r"expected shape of rank 2 or 3"),
        (
            "conv_state",
            draw("float32", B, D, 2),
            ValueError,
            r"expected shape \(2, 19, S\) with S of at least 3",
        ),
        ("conv_state", draw("float32", B + 1, D, 3), ValueError, r"expected shape \(2, 19, S\)"),
        ("conv_state", draw("float64", B, D, 3), TypeError, "expected dtype float32 as x has, got float64"),
        ("conv_state", draw("float32", B, D, 4)[..., ::-1], ValueError, "expected a writable array"),
        (
            "conv_state",
            np.broadcast_to(draw("float32", 1, D, 3), (B, D, 3)),
            ValueError,
            "expected a writable array",
        ),
        ("weight", draw("float32", D + 1, 4), ValueError, r"expected shape \(19, W\)"),
        ("bias", draw("float32", 1), ValueError, r"expected shape \(19,\)"),
        ("activation", "relu", ValueError, "expected None, 'silu' or 'swish'"),
        ("cache_seqlens", np.zeros(B + 1, np.int32), ValueError, r"expected shape \(2,\)"),
        ("cache_seqlens", np.array([-1, 0]), ValueError, "expected numbers of at least 0"),
        ("conv_state_indices", np.array([0]), ValueError, r"expected shape \(2,\)"),
        ("conv_state_indices", np.array([0, 2]), ValueError, "expected numbers below 2, .* got 2"),
        (
            "conv_state_indices",
            np.array([1, 1]),
            ValueError,
            "expected a state of its own for each sequence, got 1",
        ),
        ("conv_state_indices", np.array([0.0, 1.0]), TypeError, "expected dtype int32 or int64"),
    ],
)
def test_bad_input_of_updates(name, wrong, error, message):
    given = {
        "x": draw("float32", B, D),
        "conv_state": draw("float32", B, D, 4),
        "weight": draw("float32", D, 4),
    }
    before = given["conv_state"].copy()
    with pytest.raises(error, match=rf"^{name}: {message}"):
        ops.causal_conv1d_update(**{**given, name: wrong})
    np.testing.assert_array_equal(given["conv_state"], before)


def test_memory_that_is_shared():
    state, weight = draw("float32", B, D, 4), draw("float32", D, 4)
    with pytest.raises(
        ValueError, match=r"^conv_state: expected memory of its own, got memory that overlaps x"
    ):
        ops.causal_conv1d_update(state[..., :1], state, weight)
    x = draw("float32", B, D, T)
    with pytest.raises(
        ValueError, match=r"^final_states_out: expected memory of its own, got memory that overlaps x"
    ):
        ops.causal_conv1d_fn(x, weight, final_states_out=x[..., :3])


SIGNATURES = {
    "causal_conv1d": (
        "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, "
        "backend='triton', cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, kwargs"
    ),
    "causal_conv1d_fn": (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, "
        "activation=None"
    ),
    "causal_conv1d_update": (
        "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert ", ".join(shown) == SIGNATURES[name]
    for parameter in parameters:
        assert (
            f"        {'**' * (parameter.name == 'kwargs')}{parameter.name}: " in getattr(ops, name).__doc__
        )
