"""Windows: every pair of sides, one for each head, what they hide, and that they are what they stand for."""

import numpy as np
import pytest
import torch

import subquad
from subquad import reference
from subquad.testing import assert_close, naive_attention

# Many queries and keys in several blocks, more queries than keys, few queries with many keys, one of each.
FORMS = {
    "many": (70, 150),
    "square": (100, 100),
    "more queries": (65, 40),
    "few": (2, 700),
    "one": (1, 64),
    "one key": (3, 1),
}
WINDOWS = [
    (0, 0),
    (5, 0),
    (0, 5),
    (3, 70),
    (63, 0),
    (64, 1),
    (7, None),
    (None, 0),
    (None, 9),
    (None, None),
    (1000, 1000),
    (2**40, 2**62),
]


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return draw(dtype, 2, queries, 4, 32), draw(dtype, 2, keys, 2, 32), draw(dtype, 2, keys, 2, 20)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", WINDOWS, ids=str)
def test_window(window_size, causal, inputs, check_attention):
    out = np.full((*inputs[0].shape[:3], 20), np.nan, inputs[0].dtype)
    check_attention(*inputs, window_size=window_size, causal=causal, scores=20.0, out=out)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_heads(causal, inputs, check_attention):
    sides = [(0, 0), (5, 3), (None, 1), (20, None)]
    check_attention(*inputs, window_size=sides, causal=causal, scores=20.0)
    expected = subquad.attention(*inputs, window_size=sides, causal=causal)
    array = np.array([[0, 0], [5, 3], [-1, 1], [20, -1]])
    for window_size in (tuple(sides), array, array.astype(np.int32), np.asfortranarray(array)):
        found = subquad.attention(*inputs, window_size=window_size, causal=causal)
        np.testing.assert_array_equal(found, expected)


def test_one_window_for_every_head_is_that_window(inputs):
    expected = subquad.attention(*inputs, window_size=(6, 2))
    np.testing.assert_array_equal(subquad.attention(*inputs, window_size=[(6, 2)] * 4), expected)
    np.testing.assert_array_equal(subquad.attention(*inputs, window_size=np.full((4, 2), (6, 2))), expected)


def test_windows_that_hide_nothing_change_nothing(inputs):
    for causal in (False, True):
        expected = subquad.attention(*inputs, causal=causal)
        for window_size in ((None, None), (1000, 1000), (2**62, None), np.full((4, 2), -1)):
            found = subquad.attention(*inputs, window_size=window_size, causal=causal)
            np.testing.assert_array_equal(found, expected)
    expected = subquad.attention(*inputs, causal=True)
    for window_size in ((None, 0), (1000, 0)):
        np.testing.assert_array_equal(subquad.attention(*inputs, window_size=window_size), expected)


@pytest.mark.parametrize("kind", [tuple, list, lambda x: tuple(np.int64(side) for side in x)])
def test_pairs_of_every_kind(kind, draw):
    q = draw("float32", 1, 9, 2, 8)
    expected = subquad.attention(q, q, q, window_size=(2, 1))
    np.testing.assert_array_equal(subquad.attention(q, q, q, window_size=kind((2, 1))), expected)


def test_windows_of_tensors(dtype, draw, convert):
    arrays = [draw(dtype, 1, 9, 2, 8) for _ in range(3)]
    sides = np.array([[2, 1], [-1, 0]])
    expected = subquad.attention(*(convert("torch", x) for x in arrays), window_size=[(2, 1), (None, 0)])
    found = subquad.attention(*(convert("torch", x) for x in arrays), window_size=torch.from_numpy(sides))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("window_size", [(3, 0), (10, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("bias", ["bool", "numbers"])
def test_windows_and_dense_masks(bias, window_size, inputs, form, dtype, draw, check_attention):
    accumulator = "float64" if dtype == "float64" else "float32"
    mask = draw(accumulator, 2, 1, *form)
    mask = mask > -0.5 if bias == "bool" else mask
    check_attention(*inputs, window_size=window_size, bias=mask, scores=20.0)


@pytest.mark.parametrize("group", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("window_size", [(4, 0), (17, 3)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(40, 60), (1, 900), (5, 333)])
def test_groups(queries, keys, window_size, group, dtype, draw, check_attention):
    q, k, v = draw(dtype, 1, queries, 2 * group, 16), draw(dtype, 1, keys, 2, 16), draw(dtype, 1, keys, 2, 24)
    check_attention(q, k, v, window_size=window_size, scores=20.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize(("left", "right"), [(4, 0), (20, 2), (0, 0), (3, 5)])
@pytest.mark.parametrize(("queries", "keys", "group"), [(40, 60, 1), (40, 60, 4), (4, 600, 2), (90, 90, 16)])
def test_hidden_keys_do_not_leak(queries, keys, group, left, right, where, bad, dtype, draw):
    q, k, v = draw(dtype, 2, queries, group, 16), draw(dtype, 2, keys, 1, 16), draw(dtype, 2, keys, 1, 8)
    options = {"window_size": (left, right)}
    expected, naive = (
        reference.attention(q, k, v, **options),
        naive_attention(q, k, v, dtype=dtype, **options)[0],
    )
    clean = subquad.attention(q, k, v, **options)
    for row in (0, queries // 2, queries - 1):
        # Everything that this row does not see, right up to the edges of its window.
        hidden = np.ones(keys, bool)
        position = row + keys - queries
        hidden[max(position - left, 0) : position + right + 1] = False
        dirty_k, dirty_v = k.copy(), v.copy()
        if "k" in where:
            dirty_k[:, hidden] = bad
        if "v" in where:
            dirty_v[:, hidden] = bad
        out = clean.copy()
        out[:, row] = subquad.attention(q, dirty_k, dirty_v, **options)[:, row]
        assert_close(out, expected, naive=naive, dtype=dtype)


def test_queries_before_the_first_key_see_what_their_window_reaches(dtype, draw):
    q, k, v = draw(dtype, 1, 9, 2, 8), draw(dtype, 1, 4, 2, 8), draw(dtype, 1, 4, 2, 8)
    out, lse = subquad.attention(q, k, v, window_size=(None, 2), return_lse=True)
    # Positions -5 to 3: those of -3 and less reach no key, that of -2 the first alone.
    assert (out[:, :3].astype(np.float64) == 0).all()
    assert np.isneginf(lse[:, :, :3]).all()
    np.testing.assert_array_equal(out[:, 3], v[:, 0])
    assert np.isfinite(lse[:, :, 3:]).all()


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_short_window_of_a_long_sequence(queries, dtype, draw, check_attention):
    q, k, v = draw(dtype, 1, queries, 2, 16), draw(dtype, 1, 20_000, 1, 16), draw(dtype, 1, 20_000, 1, 8)
    k[:, :19_000], v[:, :19_000] = np.nan, np.nan
    clean = [np.where(np.isnan(x), 0, x).astype(x.dtype) for x in (q, k, v)]
    check_attention(q, k, v, clean=tuple(clean), window_size=(300, 0), scores=20.0)


@pytest.mark.parametrize("window_size", [(9, 0), (100, 30), [(3, 0), (70, 10)]], ids=str)
@pytest.mark.parametrize("queries", [2, 300])
def test_threads_do_not_change_bits(queries, window_size, dtype, draw, keep_num_threads):
    q, k, v = draw(dtype, 1, queries, 2, 32), draw(dtype, 1, 1500, 2, 32), draw(dtype, 1, 1500, 2, 32)
    results = []
    for threads in (1, 2, 3, 5):
        subquad.set_num_threads(threads)
        results.append(subquad.attention(q, k, v, window_size=window_size, return_lse=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])
