"""Exact attention under causal, boolean and additive masks, with numbers and without in hidden places."""

import numpy as np
import pytest

import subquad
from subquad import reference
from subquad.testing import assert_close, naive_attention

BROADCASTS = (
    "bhqk",
    "bh1k",
    "b1qk",
    "1hqk",
    "b11k",
    "11qk",
    "1h1k",
    "bhq1",
    "1111",
    "hqk",
    "qk",
    "1k",
    "k",
    "",
)
# Many queries, and few queries with many keys, which another kernel computes in several pieces.
FORMS = {"many": (37, 50), "few": (2, 700)}


@pytest.fixture(params=FORMS)
def lengths(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def shape_of(lengths):
    """Spells a shape by its axes."""
    sizes = {"b": 2, "h": 4, "q": lengths[0], "k": lengths[1], "1": 1}
    return lambda axes: tuple(sizes[axis] for axis in axes)


@pytest.fixture
def inputs(dtype, draw, lengths):
    """`q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = lengths
    return draw(dtype, 2, queries, 4, 32), draw(dtype, 2, keys, 2, 32), draw(dtype, 2, keys, 2, 20)


@pytest.fixture
def accumulator(dtype):
    """The dtype of scores."""
    return "float64" if dtype == "float64" else "float32"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", BROADCASTS)
def test_boolean_mask_of_every_form(axes, causal, inputs, shape_of, check_attention):
    visible = np.asarray(np.random.default_rng(1).random(shape_of(axes)) > 0.3)
    check_attention(*inputs, bias=visible, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", BROADCASTS)
def test_bias_of_every_form(axes, causal, inputs, shape_of, accumulator, draw, check_attention):
    check_attention(*inputs, bias=np.asarray(draw(accumulator, *shape_of(axes), width=2)), causal=causal)


def test_bias_of_the_inputs_dtype(inputs, shape_of, dtype, draw, check_attention):
    check_attention(*inputs, bias=draw(dtype, *shape_of("bhqk")), causal=True)


@pytest.mark.parametrize("of", ["bool", "bias"])
def test_broadcast_mask_is_read_by_strides(of, inputs, shape_of, accumulator, draw):
    mask = draw(accumulator, *shape_of("b11k"))
    mask = mask > 0 if of == "bool" else mask
    wide = np.broadcast_to(mask, shape_of("bhqk"))
    expected = subquad.attention(*inputs, bias=np.ascontiguousarray(wide))
    np.testing.assert_array_equal(subquad.attention(*inputs, bias=wide), expected)
    np.testing.assert_array_equal(subquad.attention(*inputs, bias=mask), expected)


def test_mask_of_any_strides(inputs, shape_of, accumulator, draw):
    bias = draw(accumulator, *shape_of("bhqk"))
    expected = subquad.attention(*inputs, bias=bias)
    for axes in [(3, 2, 1, 0), (0, 1, 3, 2), (2, 3, 0, 1)]:
        view = np.ascontiguousarray(bias.transpose(axes)).transpose(np.argsort(axes))
        np.testing.assert_array_equal(subquad.attention(*inputs, bias=view), expected)
    every_other = np.repeat(np.repeat(bias, 2, axis=3), 3, axis=2)[:, :, ::3, ::2]
    np.testing.assert_array_equal(subquad.attention(*inputs, bias=every_other), expected)


def test_true_is_any_byte_but_zero(inputs, lengths):
    visible = np.random.default_rng(2).integers(0, 3, lengths, dtype=np.uint8)
    expected = subquad.attention(*inputs, bias=visible > 0)
    # NumPy's own comparisons write 1, but a view of foreign bytes is a boolean array, too.
    np.testing.assert_array_equal(subquad.attention(*inputs, bias=visible.view(np.bool_)), expected)


@pytest.mark.parametrize(
    ("queries", "keys"), [(4, 4), (2, 4), (4, 2), (1, 9), (9, 1), (70, 33), (33, 70), (3, 600)]
)
def test_causal_aligns_at_the_last_query_and_key(queries, keys, dtype, draw):
    q, k, v = draw(dtype, 1, queries, 2, 8), draw(dtype, 1, keys, 2, 8), draw(dtype, 1, keys, 2, 8)
    out, lse = subquad.attention(q, k, v, causal=True, return_lse=True)
    visible = np.tri(queries, keys, keys - queries, dtype=bool)
    dense, dense_lse = subquad.attention(q, k, v, bias=visible, return_lse=True)
    blind = ~visible.any(axis=1)
    assert blind.sum() == max(queries - keys, 0)
    assert (out[:, blind].astype(np.float64) == 0).all()
    assert np.isneginf(lse[:, :, blind]).all()
    assert np.isneginf(dense_lse[:, :, blind]).all()
    expected = reference.attention(q, k, v, causal=True)
    naive, _ = naive_attention(q, k, v, dtype=dtype, causal=True)
    assert_close(out, expected, naive=naive, dtype=dtype)
    assert_close(dense, expected, naive=naive, dtype=dtype)


@pytest.mark.parametrize("of", ["bool", "-inf"])
def test_fully_masked_rows_are_zero(of, inputs, lengths, shape_of, accumulator, check_attention):
    visible = np.ones(shape_of("b1qk"), bool)
    visible[0, 0, [0, lengths[0] // 3, -1]] = False
    visible[1] = False
    bias = visible if of == "bool" else np.where(visible, 0, -np.inf).astype(accumulator)
    out = np.full((2, lengths[0], 4, 20), np.nan, inputs[0].dtype)
    check_attention(*inputs, bias=bias, out=out)
    rows = ~visible[:, 0].any(axis=-1)
    assert (out[rows].astype(np.float64) == 0).all()


@pytest.mark.parametrize("seen", [slice(0, 3), slice(-3, None), slice(20, 23)])
def test_a_few_visible_keys_among_many(seen, inputs, shape_of, check_attention):
    # Most blocks of keys, and most pieces of a long sequence, show nothing.
    visible = np.zeros(shape_of("11qk"), bool)
    visible[..., seen] = True
    check_attention(*inputs, bias=visible)


def test_lowest_finite_bias_is_a_number(inputs, lengths, shape_of, dtype, accumulator):
    # Masks of transformers hide with the lowest number; a row of nothing else is uniform, as in PyTorch.
    bias = np.zeros(shape_of("b1qk"), accumulator)
    bias[:, :, :, ::2] = np.finfo(accumulator).min
    bias[:, :, lengths[0] // 2] = np.finfo(accumulator).min
    out, lse = subquad.attention(*inputs, bias=bias, return_lse=True)
    expected = reference.attention(*inputs, bias=bias)
    naive, naive_lse = naive_attention(*inputs, dtype=dtype, bias=bias)
    assert_close(out, expected, naive=naive, dtype=dtype)
    np.testing.assert_allclose(lse, naive_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("mask", ["bool", "per key", "-inf"])
def test_masked_keys_do_not_leak(mask, where, bad, inputs, shape_of, accumulator, check_attention):
    hidden = [0, 3, 17, 31, 32, 48, 49, -2, -1]
    visible = np.ones(shape_of("111k" if mask == "per key" else "11qk"), bool)
    visible[..., hidden] = False
    bias = np.where(visible, 0, -np.inf).astype(accumulator) if mask == "-inf" else visible
    q, k, v = (x.copy() for x in inputs)
    k[:, hidden], v[:, hidden] = 0, 0
    clean = q, k.copy(), v.copy()
    if "k" in where:
        k[:, hidden] = bad
    if "v" in where:
        v[:, hidden] = bad
    check_attention(q, k, v, clean=clean, bias=bias)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e4])
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize(
    ("group", "queries", "keys"), [*((n, 40, 40) for n in (1, 2, 3, 4, 8, 16, 32)), (2, 4, 600)]
)
def test_future_keys_do_not_leak(group, queries, keys, where, bad, dtype, draw):
    q, k, v = draw(dtype, 2, queries, group, 16), draw(dtype, 2, keys, 1, 16), draw(dtype, 2, keys, 1, 8)
    expected = reference.attention(q, k, v, causal=True)
    naive, _ = naive_attention(q, k, v, dtype=dtype, causal=True)
    for rows in (1, 2, queries // 2, queries - 1):
        # The first key that none of these rows sees.
        first = keys - queries + rows
        dirty_k, dirty_v = k.copy(), v.copy()
        if "k" in where:
            dirty_k[:, first:] = bad
        if "v" in where:
            dirty_v[:, first:] = bad
        out = subquad.attention(q, dirty_k, dirty_v, causal=True)
        # All rows together measure what the dtype loses.
        out = np.concatenate([out[:, :rows].astype(np.float64), expected[:, rows:]], axis=1)
        assert_close(out, expected, naive=naive, dtype=dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["q", "k", "v", "bias"])
def test_visible_numbers_propagate(place, bad, inputs, shape_of, accumulator):
    q, k, v = (x.copy() for x in inputs)
    bias = np.zeros(shape_of("bhqk"), accumulator)
    {"q": q, "k": k, "v": v, "bias": bias}[place][1, 1, 1, 3] = bad
    out, lse = subquad.attention(q, k, v, causal=True, bias=bias, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, causal=True, bias=bias, return_lse=True)
    np.testing.assert_array_equal(np.isnan(out.astype(np.float64)), np.isnan(expected))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(expected_lse))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(out.astype(np.float64)[infinite], expected[infinite])
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(expected_lse))
