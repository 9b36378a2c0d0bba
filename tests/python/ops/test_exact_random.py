"""Random shapes, dtypes, strides and masks: the right result, or one of the documented exceptions."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import subquad

DTYPES = ["float32", "float64", "float16", "bfloat16"]
OTHERS = ["int32", "complex64", "uint8"]
DOCUMENTED = (ValueError, TypeError, NotImplementedError, OverflowError)
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    # Fixtures are functions without state, and one generator that only ever goes on.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

lengths = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 33, 65, 97])
# From 512 keys on, few queries are computed in pieces.
key_lengths = st.one_of(lengths, lengths, st.sampled_from([300, 600]))
widths = st.sampled_from([1, 2, 3, 5, 8, 16, 20, 33, 64])
layouts = st.sampled_from(["plain", "plain", "transposed", "padded", "width-major", "backwards", "read-only"])


def array_of(dtype, shape, layout, seed):
    """Returns a standard normal array with strides of its own."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    array = np.random.default_rng(seed).standard_normal(shape).astype(kind)
    if layout == "transposed":
        array = np.ascontiguousarray(array.swapaxes(0, -2)).swapaxes(0, -2)
    elif layout == "padded":
        larger = np.full((*(2 * n for n in shape[:-1]), shape[-1] + 1), np.nan).astype(kind)
        view = larger[(*(slice(None, None, 2) for _ in shape[:-1]), slice(1, None))]
        view[...] = array
        array = view
    elif layout == "width-major":
        array = np.asfortranarray(array)
    elif layout == "backwards":
        array = np.ascontiguousarray(array[..., ::-1, :])[..., ::-1, :]
    elif layout == "read-only":
        array.flags.writeable = False
    return array


@st.composite
def fitting_calls(draw):
    """Draws arguments of `attention` that fit."""
    dtype, kv_heads = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3))
    batch, queries, keys = draw(st.integers(0, 3)), draw(lengths), draw(key_lengths)
    heads, width = kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])), draw(widths)
    shapes = (
        (batch, queries, heads, width),
        (batch, keys, kv_heads, width),
        (batch, keys, kv_heads, draw(widths)),
    )
    q, k, v = (array_of(dtype, shape, draw(layouts), seed) for seed, shape in enumerate(shapes))
    options = {"causal": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.0, -0.5, 0.1]))}
    of = draw(st.sampled_from(["none", "bool", "acc", "own"]))
    if of != "none":
        full = batch, heads, queries, keys
        shape = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, 3)) :]
        accumulator = "float64" if dtype == "float64" else "float32"
        bias = array_of(dtype if of == "own" else accumulator, shape, "plain", 9)
        options["bias"] = bias > -0.5 if of == "bool" else bias
    return (q, k, v), options


@given(call=fitting_calls())
@SETTINGS
def test_fitting_calls_are_right(call, check_attention):
    (q, k, v), options = call
    check_attention(q, k, v, scores=20.0, **options)


# Mostly of the right rank and of few extents, so that many calls fit or almost do.
dimensions = st.sampled_from([1, 2, 2, 4])
shapes = st.one_of(
    st.tuples(*[dimensions] * 4),
    st.tuples(*[dimensions] * 4),
    st.lists(st.sampled_from([0, 1, 2, 3, 513]), max_size=6)
    .map(tuple)
    .filter(lambda shape: np.prod(shape) < 1e6),
)
dtypes = st.sampled_from(["float32"] * 6 + DTYPES + OTHERS)
arrays = st.builds(array_of, dtypes, shapes, st.sampled_from(["plain", "read-only"]), st.integers(0, 9))


def as_tensor(array):
    """Returns a tensor, of another dtype where PyTorch lacks NumPy's."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())


things = st.one_of(
    arrays, arrays, arrays.map(as_tensor), st.sampled_from([None, "q", 1.5, [[1.0]], torch.ones(1, 2, 2, 4)])
)
options = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.sampled_from([None, 0.0, -1.0, np.inf, np.nan]),
        "bias": things,
        "out": things,
        "causal": st.booleans(),
        "return_lse": st.booleans(),
    },
)


@given(q=things, k=things, v=things, options=options)
@SETTINGS
def test_any_call_of_attention_ends_well(q, k, v, options):
    try:
        result = subquad.attention(q, k, v, **options)
    except DOCUMENTED:
        pass
    else:
        out = result[0] if options.get("return_lse") else result
        assert tuple(out.shape) == (*q.shape[:3], v.shape[3])
        assert out.dtype == q.dtype


@given(
    query=things,
    key=things,
    value=things,
    mask=st.one_of(st.none(), things),
    options=st.fixed_dictionaries(
        {},
        optional={
            "is_causal": st.booleans(),
            "enable_gqa": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.1]),
        },
    ),
)
@SETTINGS
def test_any_call_of_sdpa_ends_well(query, key, value, mask, options):
    try:
        out = subquad.scaled_dot_product_attention(query, key, value, mask, **options)
    except DOCUMENTED:
        pass
    else:
        assert tuple(out.shape[-2:]) == (query.shape[-2], value.shape[-1])
        assert out.dtype == query.dtype


@given(
    leading=st.lists(st.integers(1, 3), max_size=4),
    drop=st.tuples(*[st.integers(0, 4)] * 3),
    ones=st.lists(st.booleans(), min_size=12, max_size=12),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20), widths, widths),
    dtype=st.sampled_from(DTYPES),
    of=st.sampled_from(["none", "causal", "bool", "own"]),
)
@SETTINGS
def test_any_broadcast_of_sdpa_is_torchs(leading, drop, ones, sizes, dtype, of, check_sdpa):
    queries, keys, width, width_v = sizes
    inputs = []
    for i, tail in enumerate([(queries, width), (keys, width), (keys, width_v)]):
        axes = [1 if ones[4 * i + axis] else n for axis, n in enumerate(leading)]
        inputs.append(as_tensor(array_of(dtype, (*axes[min(drop[i], len(axes)) :], *tail), "plain", i)))
    mask = None
    if of in {"bool", "own"}:
        # In PyTorch a mask broadcasts to the scores, which value has no part in.
        common = np.broadcast_shapes(*(tuple(x.shape[:-2]) for x in inputs[:2]))
        shape = (*(1 if ones[axis] else n for axis, n in enumerate(common)), queries, keys)
        mask = as_tensor(array_of(dtype, shape, "plain", 5))
        mask = mask > -0.7 if of == "bool" else mask
    check_sdpa(*inputs, mask, is_causal=of == "causal")


def test_documented_exceptions_are_not_internal_errors():
    # A panic is a RuntimeError, which the tests above do not accept.
    assert not issubclass(RuntimeError, DOCUMENTED)
    with pytest.raises(DOCUMENTED):
        subquad.attention(1, 2, 3)
