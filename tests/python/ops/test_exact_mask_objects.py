"""Mask objects against the oracle, few queries and many, and together with the other ways to hide keys."""

import jax
import numpy as np
import pytest
import torch

import subquad
from subquad import reference
from subquad.masks import block_causal, causal, chunked, document, padding, prefix, sliding_window
from subquad.testing import assert_close, naive_attention

FORMS = {"many": (70, 130), "square": (100, 100), "more queries": (65, 40), "few": (2, 700), "one": (1, 64)}


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return draw(dtype, 3, queries, 4, 32), draw(dtype, 3, keys, 2, 32), draw(dtype, 3, keys, 2, 20)


def ids(seed, *shape, documents=4):
    """Documents in any order: their keys are many intervals."""
    return np.random.default_rng(seed).integers(0, documents, shape)


def packed(*lengths):
    """Documents one after the other."""
    return np.repeat(np.arange(len(lengths)), lengths)


MASKS = {
    "causal": lambda q, k: causal(),
    "window": lambda q, k: sliding_window(9),
    "window of both sides": lambda q, k: sliding_window(3, 20),
    "window of one": lambda q, k: sliding_window(0),
    "chunked": lambda q, k: chunked(16),
    "chunked causal": lambda q, k: chunked(24) & causal(),
    "one chunk": lambda q, k: chunked(10_000),
    "block causal": lambda q, k: block_causal(10),
    "prefix language model": lambda q, k: prefix([0, 7, k]) | causal(),
    "one prefix": lambda q, k: prefix(5) | sliding_window(2),
    "prefix beyond the end": lambda q, k: prefix(2**40),
    "documents in any order": lambda q, k: document(ids(1, 3, q), ids(2, 3, k)),
    "one order for all": lambda q, k: document(ids(3, q), ids(4, k)),
    "packed": lambda q, k: document(packed(q - q // 3, q // 3), packed(k // 2, k - k // 2)) & causal(),
    "documents that nobody reads": lambda q, k: document(ids(5, q), ids(6, k) + 3),
    "padding": lambda q, k: padding([k, 1, k // 2]),
    "padding on both sides": lambda q, k: padding([k, k - 3 if k > 3 else k, k // 2], [0, 1, k // 4]),
    "padding of queries": lambda q, k: padding([k - 1, k, k // 2], [0, 1, k // 4], queries=True) & causal(),
    "nothing": lambda q, k: padding(0),
    "alternatives": lambda q, k: (
        prefix(3) | (chunked(8) & causal()) | (sliding_window(4) & padding([k, 5, 9]))
    ),
    "conditions": lambda q, k: (
        (prefix(30) | sliding_window(6)) & padding(k, 2) & (causal() | block_causal(7))
    ),
    # A hole in the middle: two intervals for every query.
    "sinks and window": lambda q, k: (prefix(4) | sliding_window(8)) & causal(),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(name, inputs, form, check_attention):
    out = np.full((*inputs[0].shape[:3], 20), np.nan, inputs[0].dtype)
    check_attention(*inputs, mask=MASKS[name](*form), scores=20.0, out=out)


@pytest.mark.parametrize("name", ["chunked", "documents in any order", "padding of queries", "alternatives"])
def test_masks_join_with_everything_that_hides(name, inputs, form, check_attention):
    bias = np.random.default_rng(1).random((3, 1, *form)) > 0.3
    mask = MASKS[name](*form)
    for options in (
        {"causal": True},
        {"window_size": (20, 3)},
        {"window_size": [(5, 0), (None, 0), (0, 9), (40, 40)], "causal": True},
        {"bias": bias},
        {"bias": bias, "causal": True, "window_size": (30, None)},
    ):
        check_attention(*inputs, mask=mask, scores=20.0, **options)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (causal(), {"causal": True}),
        (sliding_window(9), {"window_size": (9, 0)}),
        (sliding_window(9, None), {"window_size": (9, None)}),
        (sliding_window(None, None), {}),
        (prefix(2**40), {}),
        (causal() & sliding_window(5, 5), {"window_size": (5, 5), "causal": True}),
        (causal() | causal(), {"causal": True}),
    ],
    ids=str,
)
def test_masks_are_the_arguments_that_they_stand_for(mask, options, inputs):
    found = subquad.attention(*inputs, mask=mask, return_lse=True)
    expected = subquad.attention(*inputs, return_lse=True, **options)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=3e-2, atol=3e-2)


def test_packed_documents_are_separate_calls(dtype, draw):
    lengths = [1, 30, 64, 5]
    q, k, v = (draw(dtype, 1, 100, heads, 16) for heads in (4, 2, 2))
    out = subquad.attention(q, k, v, mask=document(packed(*lengths)), causal=True)
    expected = reference.attention(q, k, v, mask=document(packed(*lengths)), causal=True)
    naive, _ = naive_attention(q, k, v, dtype=dtype, mask=document(packed(*lengths)), causal=True)
    ends = np.cumsum(lengths)
    parts = [
        subquad.attention(*(x[:, end - n : end] for x in (q, k, v)), causal=True)
        for n, end in zip(lengths, ends, strict=True)
    ]
    assert_close(out, expected, naive=naive, dtype=dtype)
    assert_close(np.concatenate(parts, axis=1), expected, naive=naive, dtype=dtype)


def test_one_more_token_sees_what_the_prompt_would(dtype, draw):
    # The position of a query counts from the end: one query alone is the last row of the whole.
    q, k, v = draw(dtype, 3, 50, 4, 16), draw(dtype, 3, 50, 2, 16), draw(dtype, 3, 50, 2, 16)
    for mask in (
        chunked(8) & causal(),
        block_causal(9),
        prefix([3, 4, 50]) | causal(),
        padding([50, 49, 20], 2, queries=True) & causal(),
    ):
        expected = reference.attention(q, k, v, mask=mask)
        naive, _ = naive_attention(q, k, v, dtype=dtype, mask=mask)
        whole = subquad.attention(q, k, v, mask=mask)
        assert_close(whole, expected, naive=naive, dtype=dtype)
        whole[:, -1:] = subquad.attention(q[:, -1:], k, v, mask=mask)
        assert_close(whole, expected, naive=naive, dtype=dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "kv"])
def test_padding_does_not_leak(where, bad, inputs, form, check_attention):
    _, keys = form
    start, end = [0, keys // 3, keys - 1], [keys, keys - 1, keys]
    q, k, v = (x.copy() for x in inputs)
    for b in range(3):
        for x, name in ((k, "k"), (v, "v")):
            x[b, : start[b]], x[b, end[b] :] = 0, 0
            assert np.isfinite(x.astype(np.float64)).all(), name
    clean = q, k.copy(), v.copy()
    for b in range(3):
        for x in [x for x, name in ((k, "k"), (v, "v")) if name in where]:
            x[b, : start[b]], x[b, end[b] :] = bad, bad
    for queries in (False, True):
        mask = padding(end, start, queries=queries)
        check_attention(q, k, v, clean=clean, mask=mask, scores=20.0)
        check_attention(q, k, v, clean=clean, mask=mask & causal(), scores=20.0)


def test_keys_between_intervals_do_not_leak(dtype, draw):
    q, k, v = draw(dtype, 1, 90, 2, 16), draw(dtype, 1, 90, 1, 16), draw(dtype, 1, 90, 1, 8)
    mask = (prefix(3) | sliding_window(5)) & causal()
    expected, naive = (
        reference.attention(q, k, v, mask=mask),
        naive_attention(q, k, v, dtype=dtype, mask=mask)[0],
    )
    for x in (k, v):
        x[:, 3:70] = np.nan
    out = subquad.attention(q, k, v, mask=mask)
    assert np.isnan(out[:, 3:75].astype(np.float64)).all()
    # The rows of the prefix, and those whose windows begin after the hole, do not see it.
    out[:, 3:75] = expected[:, 3:75].astype(out.dtype)
    assert_close(out, expected, naive=naive, dtype=dtype)


@pytest.mark.parametrize("queries", [2, 300])
def test_threads_do_not_change_bits(queries, dtype, draw, keep_num_threads):
    q, k, v = draw(dtype, 1, queries, 4, 32), draw(dtype, 1, 1500, 2, 32), draw(dtype, 1, 1500, 2, 32)
    mask = document(ids(1, queries), ids(2, 1500)) | sliding_window(50)
    results = []
    for threads in (1, 2, 3, 5):
        subquad.set_num_threads(threads)
        results.append(subquad.attention(q, k, v, mask=mask, return_lse=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("convert", [list, torch.tensor, jax.numpy.asarray, np.array])
def test_integers_of_any_library_with_arrays_of_another(convert, draw):
    q = draw("float32", 2, 4, 2, 8)
    expected = subquad.attention(q, q, q, mask=padding(np.array([4, 2])))
    np.testing.assert_array_equal(subquad.attention(q, q, q, mask=padding(convert([4, 2]))), expected)
    found = subquad.attention(*[torch.from_numpy(q)] * 3, mask=padding(convert([4, 2])))
    np.testing.assert_array_equal(found.numpy(), expected)
