"""Gradients of exact attention against the oracle: lengths, widths, heads, layouts."""

import numpy as np
import pytest

import subquad

LENGTHS = {1, 2, 63, 64, 65, 100, 1000}
WIDTHS = {1, 8, 20, 60, 64, 80, 96, 128, 192, 256, 512}

# (B, Sq, Sk, H, Hkv, D, Dv): every length, width and grouping at least once, not every combination.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1000, 4, 4, 128, 128),
    (1, 1, 1000, 8, 2, 64, 64),
    (2, 2, 63, 4, 1, 8, 20),
    (2, 63, 2, 2, 2, 20, 8),
    (1, 64, 65, 2, 2, 60, 60),
    (2, 65, 64, 4, 1, 80, 96),
    (1, 33, 100, 16, 1, 96, 64),
    (1, 100, 63, 4, 4, 128, 1),
    (1, 63, 100, 2, 1, 192, 128),
    (1, 65, 65, 2, 2, 256, 192),
    (1, 64, 64, 1, 1, 512, 512),
    (1, 2, 1000, 2, 1, 512, 256),
    (2, 3, 1000, 8, 1, 20, 33),
    (2, 1000, 1, 2, 1, 1, 80),
    (1, 1000, 65, 2, 2, 64, 64),
    (1, 400, 1000, 1, 1, 8, 20),
    (3, 2, 2, 6, 3, 1, 512),
]


def test_the_shapes_cover_what_must_appear():
    queries, keys = {shape[1] for shape in SHAPES}, {shape[2] for shape in SHAPES}
    assert queries >= LENGTHS
    assert keys >= LENGTHS
    assert {shape[5] for shape in SHAPES} >= WIDTHS
    assert {shape[6] for shape in SHAPES} >= WIDTHS
    groups = {(h // kv, kv) for _, _, _, h, kv, _, _ in SHAPES}
    assert {1, 4} <= {group for group, _ in groups}
    assert {16, 4} <= {group for group, kv in groups if kv == 1}


@pytest.fixture
def inputs(dtype, draw):
    """Draws `do`, `q`, `k` and `v` of a shape as above."""

    def inputs(batch, queries, keys, heads, kv_heads, width, width_v):
        return (
            draw(dtype, batch, queries, heads, width_v),
            draw(dtype, batch, queries, heads, width),
            draw(dtype, batch, keys, kv_heads, width),
            draw(dtype, batch, keys, kv_heads, width_v),
        )

    return inputs


def backward(do, q, k, v, **options):
    """Gradients of everything that has one."""
    out, lse = subquad.attention(q, k, v, return_lse=True, **options)
    wrt = ["q", "k", "v", *(name for name in ("bias", "sinks", "relative_bias") if name in options)]
    return subquad.attention_backward(do, q, k, v, out, lse, wrt=wrt, **options)


def assert_equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        # NumPy has no view of PyTorch's bfloat16.
        both = (a.double().numpy() if hasattr(a, "double") else a.astype(np.float64) for a in (x, y))
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(shape, causal, inputs, check_backward):
    # PyTorch's arrays in one half of the cases.
    check_backward(*inputs(*shape), causal=causal, library="torch" if causal else "numpy")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[5], SHAPES[13]], ids=str)
def test_gradients_of_the_lse(shape, causal, inputs, dtype, draw, check_backward):
    batch, queries, _, heads, *_ = shape
    dlse = draw("float64" if dtype == "float64" else "float32", batch, heads, queries)
    do, *rest = inputs(*shape)
    whole = check_backward(do, *rest, dlse=dlse, causal=causal)
    of_lse = check_backward(0 * do, *rest, dlse=dlse, causal=causal)
    assert (of_lse["v"].astype(float) == 0).all()
    assert (of_lse["q"] != whole["q"]).any()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16, 32])
def test_every_head_of_a_group_adds_to_its_own_keys(group, inputs, check_backward):
    do, q, k, v = inputs(2, 20, 24, 2 * group, 2, 16, 24)
    found = check_backward(do, q, k, v, causal=True)
    alone = backward(do, q, np.repeat(k, group, 2), np.repeat(v, group, 2), causal=True)
    np.testing.assert_array_equal(found["q"], alone[0])


def test_heads_and_sequences_are_independent(inputs):
    arrays = inputs(3, 20, 50, 4, 4, 32, 32)
    heads, order = [2, 0, 3, 1], [1, 2, 0]
    permuted = backward(*(np.ascontiguousarray(x[order][:, :, heads]) for x in arrays), causal=True)
    assert_equal(permuted, [x[order][:, :, heads] for x in backward(*arrays, causal=True)])


def strided(array):
    """Every other entry of each leading axis of a larger array."""
    larger = np.zeros((*(2 * n for n in array.shape[:-1]), array.shape[-1] + 3), array.dtype)
    view = larger[(*(slice(None, None, 2) for _ in array.shape[:-1]), slice(3, None))]
    view[...] = array
    return view


def transposed(array):
    """A view of an array whose axes but the last are in the opposite order."""
    axes = (*range(array.ndim - 2, -1, -1), array.ndim - 1)
    return np.ascontiguousarray(array.transpose(axes)).transpose(axes)


def width_major(array):
    """A view whose last axis is not contiguous."""
    return np.asfortranarray(array)


def backwards(array):
    """A view with negative strides."""
    return np.flip(np.ascontiguousarray(np.flip(array)))


def misaligned(array):
    """A view that starts one byte beyond an element."""
    view = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    """A view that must not be written."""
    view = array.view()
    view.flags.writeable = False
    return view


LAYOUTS = [strided, transposed, width_major, backwards, misaligned, read_only]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_gradients(layout, inputs, dtype, draw):
    accumulator = "float64" if dtype == "float64" else "float32"
    do, q, k, v = inputs(2, 17, 30, 6, 3, 24, 40)
    dlse = draw(accumulator, 2, 6, 17)
    options = {
        "bias": draw(accumulator, 2, 6, 17, 30),
        "relative_bias": draw(accumulator, 6, 46),
        "sinks": draw(accumulator, 2, 6, 17),
    }
    arguments = [do, q, k, v, *subquad.attention(q, k, v, return_lse=True, **options)]
    named = {"dlse": dlse, **options}
    wrt = ("q", "k", "v", *options)
    expected = subquad.attention_backward(*arguments, wrt=wrt, **named)
    for place in range(len(arguments)):
        viewed = [layout(x) if i == place else x for i, x in enumerate(arguments)]
        assert_equal(subquad.attention_backward(*viewed, wrt=wrt, **named), expected)
    for name, x in named.items():
        assert_equal(subquad.attention_backward(*arguments, wrt=wrt, **named | {name: layout(x)}), expected)


def test_inputs_are_not_written(inputs):
    arrays = inputs(1, 20, 30, 2, 1, 16, 16)
    before = [x.copy() for x in arrays]
    backward(*arrays)
    assert_equal(arrays, before)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_expanded_gradients(library, axis, inputs, convert):
    do, *rest = inputs(2, 20, 30, 4, 2, 16, 24)
    one = do[tuple(slice(1) if i == axis else slice(None) for i in range(4))]
    expected = backward(np.broadcast_to(one, do.shape).copy(), *rest)
    # What the gradient of a sum is: one element, expanded.
    wide = np.broadcast_to(one, do.shape) if library == "numpy" else convert(library, one).expand(do.shape)
    found = backward(wide, *(convert(library, x) for x in rest))
    assert_equal(found, expected)


def test_expanded_inputs(inputs):
    arrays = inputs(1, 9, 20, 1, 1, 16, 8)
    wide = [np.broadcast_to(x, (3, x.shape[1], 2, x.shape[3])) for x in arrays]
    assert_equal(
        backward(*wide), [np.broadcast_to(x, (3, x.shape[1], 2, x.shape[3])) for x in backward(*arrays)]
    )


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0, 3.0])
def test_scale(scale, inputs, check_backward):
    check_backward(*inputs(2, 40, 50, 2, 2, 16, 16), scale=scale, causal=True)


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0])
def test_queries_without_keys_at_any_scale(scale, group, inputs, check_backward):
    found = check_backward(*inputs(1, 40, 9, group, 1, 8, 8), scale=scale, causal=True)
    assert (found["q"][:, :31].astype(float) == 0).all()


@pytest.mark.parametrize("width", [10.0, 100.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 8])
def test_large_logits(width, causal, group, dtype, inputs, check_backward):
    do, q, k, v = inputs(2, 40, 50, group, 1, 32, 8)
    check_backward(do, (q * width).astype(q.dtype), k, v, causal=causal)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "heads", "width_v"])
def test_empty_arrays(empty, inputs, dtype):
    sizes = {"batch": 2, "queries": 3, "keys": 5, "heads": 2, "width_v": 8} | {empty: 0}
    batch, queries, keys, heads, width_v = sizes.values()
    arrays = inputs(batch, queries, keys, heads, heads, 16, width_v)
    gradients = backward(*arrays)
    assert [x.shape for x in gradients] == [x.shape for x in arrays[1:]]
    # Without queries, keys or values nothing depends on anything; without `dlse` also not on the scores.
    for gradient in gradients:
        assert gradient.dtype == dtype
        assert (gradient.astype(float) == 0).all()


@pytest.mark.parametrize("empty", ["queries", "keys"])
def test_tables_of_empty_sequences(empty, inputs, dtype, draw):
    accumulator = "float64" if dtype == "float64" else "float32"
    queries, keys = (0, 5) if empty == "queries" else (3, 0)
    options = {
        "bias": draw(accumulator, 2, 1, 1),
        "relative_bias": draw(accumulator, 2, queries + keys - 1),
        "sinks": draw(accumulator, 2),
    }
    for gradient in backward(*inputs(1, queries, keys, 2, 2, 8, 8), **options)[3:]:
        assert (gradient == 0).all()
