"""Exact attention against the oracle: lengths, widths, heads, layouts."""

import numpy as np
import pytest

import subquad
from subquad.testing import assert_close, lse_floor

LENGTHS = {1, 2, 63, 64, 65, 100, 1000}
WIDTHS = {1, 8, 20, 60, 64, 80, 96, 128, 192, 256, 512}

# (B, Sq, Sk, H, Hkv, D, Dv): every length, width and grouping at least once, not every combination.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 1000, 4, 4, 128, 128),
    (1, 1, 1000, 8, 2, 64, 64),
    (2, 2, 63, 4, 1, 8, 20),
    (2, 63, 2, 2, 2, 20, 8),
    (1, 64, 65, 4, 4, 60, 60),
    (2, 65, 64, 4, 1, 80, 96),
    (1, 100, 100, 16, 1, 96, 64),
    (1, 100, 63, 8, 8, 128, 1),
    (1, 63, 100, 2, 1, 192, 128),
    (1, 65, 65, 2, 2, 256, 192),
    (1, 64, 64, 1, 1, 512, 512),
    (1, 2, 1000, 2, 1, 512, 256),
    (2, 3, 1000, 8, 1, 20, 33),
    (1, 33, 1000, 1, 1, 33, 20),
    (2, 1000, 1, 2, 1, 1, 80),
    (1, 1000, 65, 4, 4, 64, 64),
    (1, 1000, 1000, 1, 1, 64, 64),
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(shape, causal, dtype, draw, check_attention):
    batch, queries, keys, heads, kv_heads, width, width_v = shape
    q = draw(dtype, batch, queries, heads, width)
    k, v = draw(dtype, batch, keys, kv_heads, width), draw(dtype, batch, keys, kv_heads, width_v)
    # NaN shows places that were not written.
    out = np.full((batch, queries, heads, width_v), np.nan, q.dtype)
    check_attention(q, k, v, causal=causal, out=out)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16, 32])
def test_every_head_of_a_group_reads_its_own_keys(group, dtype, draw, check_attention):
    q, k, v = draw(dtype, 2, 40, 2 * group, 16), draw(dtype, 2, 40, 2, 16), draw(dtype, 2, 40, 2, 24)
    repeated = np.repeat(k, group, 2), np.repeat(v, group, 2)
    # Rows meet in other panels, which must not change what becomes of a row.
    np.testing.assert_array_equal(subquad.attention(q, k, v), subquad.attention(q, *repeated))
    check_attention(q, k, v, causal=True)
    check_attention(q, *repeated, causal=True)
    # One query, which another kernel computes.
    check_attention(q[:, :1], k, v)
    check_attention(q[:, :1], *repeated)


def test_heads_and_sequences_are_independent(dtype, draw):
    q, k, v = draw(dtype, 3, 20, 4, 32), draw(dtype, 3, 50, 4, 32), draw(dtype, 3, 50, 4, 32)
    whole = subquad.attention(q, k, v, causal=True)
    heads, order = [2, 0, 3, 1], [1, 2, 0]
    permuted = subquad.attention(
        *(np.ascontiguousarray(x[order][:, :, heads]) for x in (q, k, v)), causal=True
    )
    np.testing.assert_array_equal(permuted, whole[order][:, :, heads])


def strided(array):
    """Every other head, token and batch of a larger array."""
    batch, length, heads, width = array.shape
    larger = np.zeros((2 * batch, 3 * length, 2 * heads, width + 3), array.dtype)
    view = larger[::2, ::3, ::2, 3:]
    view[...] = array
    return view


def transposed(array):
    """A view of `[B, H, S, D]`."""
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)


def token_major(array):
    """A view of `[S, H, B, D]`."""
    return np.ascontiguousarray(array.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)


def width_major(array):
    """A view whose last axis is not contiguous."""
    return np.asfortranarray(array)


def backwards(array):
    """A view with negative strides."""
    return np.ascontiguousarray(array[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def misaligned(array):
    """A view that starts one byte beyond an element."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array):
    """A view that must not be written."""
    view = array.view()
    view.flags.writeable = False
    return view


LAYOUTS = [strided, transposed, token_major, width_major, backwards, misaligned, read_only]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_results(layout, dtype, draw):
    q, k, v = draw(dtype, 2, 33, 6, 24), draw(dtype, 2, 50, 3, 24), draw(dtype, 2, 50, 3, 40)
    expected = subquad.attention(q, k, v)
    np.testing.assert_array_equal(subquad.attention(layout(q), layout(k), layout(v)), expected)
    bias = draw(dtype, 2, 6, 33, 50)
    expected = subquad.attention(q, k, v, bias=bias)
    np.testing.assert_array_equal(subquad.attention(q, k, v, bias=layout(bias)), expected)


def test_stride_zero_is_read_in_place(dtype, draw):
    q, k, v = draw(dtype, 1, 9, 1, 16), draw(dtype, 1, 20, 1, 16), draw(dtype, 1, 20, 1, 16)
    one = subquad.attention(q, k, v)
    wide = [np.broadcast_to(x, (5, x.shape[1], 3, 16)) for x in (q, k, v)]
    np.testing.assert_array_equal(subquad.attention(*wide), np.broadcast_to(one, (5, 9, 3, 16)))


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0, 3.0])
def test_scale(scale, dtype, draw, check_attention):
    q, k, v = draw(dtype, 2, 40, 2, 16), draw(dtype, 2, 70, 2, 16), draw(dtype, 2, 70, 2, 16)
    check_attention(q, k, v, scale=scale, causal=True, scores=abs(scale) * 20)


@pytest.mark.parametrize("group", [1, 2, 8, 16])
@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0])
def test_queries_without_keys_at_any_scale(scale, group, dtype, draw, check_attention):
    # 0 times the -inf of a score that is not there would be NaN.
    q, k, v = draw(dtype, 1, 40, group, 8), draw(dtype, 1, 9, 1, 8), draw(dtype, 1, 9, 1, 8)
    check_attention(q, k, v, scale=scale, causal=True, scores=20.0)


@pytest.mark.parametrize("width", [30.0, 300.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_large_logits(width, causal, group, dtype, draw, check_attention):
    q, k, v = draw(dtype, 2, 70, group, 32, width=width), draw(dtype, 2, 90, 1, 32), draw(dtype, 2, 90, 1, 8)
    scores = float(np.abs(np.einsum("bqhd,bkud->bhqk", q.astype(float), k.astype(float))).max()) * 32**-0.5
    check_attention(q, k, v, causal=causal, scores=scores)


@pytest.mark.parametrize("length", [10_000, 100_000])
@pytest.mark.parametrize("queries", [1, 50])
def test_long_sequences_weigh_first_keys_like_last_ones(queries, length, dtype, draw):
    # All scores are 0, so all weights are 1 and their sums are exact; the first half of the values is 1. The
    # factor that shrinks old sums is 1, too: were it a little more, it would grow with every block of keys.
    q, k = np.zeros_like(draw(dtype, 1, queries, 1, 1)), np.zeros_like(draw(dtype, 1, length, 1, 1))
    v = np.zeros_like(k)
    v[:, : length // 2] = 1
    out, lse = subquad.attention(q, k, v, return_lse=True)
    half, log = np.full((1, queries, 1, 1), 0.5), np.full((1, 1, queries), np.log(length))
    assert_close(out, half, naive=half, dtype=dtype)
    assert_close(lse, log, naive=log, dtype=dtype, floor=lse_floor(log, dtype))


@pytest.mark.parametrize("empty", ["batch", "queries", "heads", "width_v"])
def test_empty_results(empty, dtype, draw):
    sizes = {"batch": 2, "queries": 3, "heads": 2, "width_v": 8, empty: 0}
    batch, queries, heads, width_v = sizes.values()
    q = draw(dtype, batch, queries, heads, 16)
    k, v = draw(dtype, batch, 5, heads, 16), draw(dtype, batch, 5, heads, width_v)
    out, lse = subquad.attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (batch, queries, heads, width_v)
    assert lse.shape == (batch, heads, queries)
    assert np.isfinite(lse).all()
    given = np.empty(out.shape, q.dtype)
    assert subquad.attention(q, k, v, out=given) is given


def test_no_keys(dtype, draw):
    q, k, v = draw(dtype, 2, 3, 4, 16), draw(dtype, 2, 0, 2, 16), draw(dtype, 2, 0, 2, 8)
    out = np.full((2, 3, 4, 8), np.nan, q.dtype)
    out, lse = subquad.attention(q, k, v, return_lse=True, out=out)
    assert (out.astype(np.float64) == 0).all()
    assert np.isneginf(lse).all()
