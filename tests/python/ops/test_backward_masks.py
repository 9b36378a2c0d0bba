"""Gradients under causal masks, windows, mask objects and dense masks: what is hidden has none."""

import numpy as np
import pytest

from subquad import reference
from subquad.masks import block_causal, causal, chunked, document, padding, prefix, sliding_window

FORMS = {"many": (50, 90), "square": (64, 64), "more queries": (65, 40), "few": (2, 300), "one": (1, 64)}


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`do`, `q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return (
        draw(dtype, 3, queries, 4, 12),
        draw(dtype, 3, queries, 4, 16),
        draw(dtype, 3, keys, 2, 16),
        draw(dtype, 3, keys, 2, 12),
    )


def ids(seed, *shape, documents=4):
    """Documents in any order: their keys are many intervals."""
    return np.random.default_rng(seed).integers(0, documents, shape)


def packed(*lengths):
    """Documents one after the other."""
    return np.repeat(np.arange(len(lengths)), lengths)


MASKS = {
    "causal": lambda q, k: causal(),
    "window of both sides": lambda q, k: sliding_window(3, 20),
    "chunked causal": lambda q, k: chunked(24) & causal(),
    "block causal": lambda q, k: block_causal(10),
    "prefix language model": lambda q, k: prefix([0, 7, k]) | causal(),
    "documents in any order": lambda q, k: document(ids(1, 3, q), ids(2, 3, k)),
    "packed": lambda q, k: document(packed(q - q // 3, q // 3), packed(k // 2, k - k // 2)) & causal(),
    "documents that nobody reads": lambda q, k: document(ids(5, q), ids(6, k) + 3),
    "padding on both sides": lambda q, k: padding([k, k - 3 if k > 3 else k, k // 2], [0, 1, k // 4]),
    "padding of queries": lambda q, k: padding([k - 1, k, k // 2], [0, 1, k // 4], queries=True) & causal(),
    "nothing": lambda q, k: padding(0),
    "alternatives": lambda q, k: (
        prefix(3) | (chunked(8) & causal()) | (sliding_window(4) & padding([k, 5, 9]))
    ),
    # A hole in the middle: two intervals for every query.
    "sinks and window": lambda q, k: (prefix(4) | sliding_window(8)) & causal(),
}
WINDOWS = [
    (0, 0),
    (5, 0),
    (0, 9),
    (20, 3),
    (None, 2),
    (7, None),
    (500, 500),
    [(0, 0), (9, 0), (None, 1), (3, None)],
    np.array([[5, 0], [-1, -1], [0, 40], [2, 2]]),
]


@pytest.mark.parametrize("name", MASKS)
def test_mask(name, inputs, form, check_backward):
    found = check_backward(*inputs, mask=MASKS[name](*form))
    seen = MASKS[name](*form).dense(3, *form)
    assert (found["q"][~seen.any(axis=2)].astype(float) == 0).all()
    for gradient in (found["k"], found["v"]):
        assert (gradient[~seen.any(axis=1)].astype(float) == 0).all()


@pytest.mark.parametrize("window_size", WINDOWS, ids=str)
def test_window(window_size, inputs, form, check_backward):
    check_backward(*inputs, window_size=window_size, causal=form in {FORMS["square"], FORMS["one"]})


@pytest.mark.parametrize(
    "name", ["chunked causal", "documents in any order", "padding of queries", "alternatives"]
)
def test_masks_join_with_everything_that_hides(name, inputs, form, check_backward):
    check_backward(
        *inputs,
        mask=MASKS[name](*form),
        causal=True,
        window_size=(30, None),
        bias=np.random.default_rng(1).random((3, 1, *form)) > 0.3,
    )


@pytest.mark.parametrize("axes", ["bhqk", "b11k", "11qk", "1h1k", "bhq1", "hqk", "qk", "k", ""])
def test_boolean_bias(axes, inputs, form, check_backward):
    sizes = {"b": 3, "h": 4, "q": form[0], "k": form[1], "1": 1}
    visible = np.asarray(np.random.default_rng(1).random([sizes[axis] for axis in axes]) > 0.3)
    check_backward(*inputs, bias=visible)


@pytest.mark.parametrize("of", ["bool", "-inf"])
def test_fully_masked_rows(of, inputs, form, dtype, check_backward):
    visible = np.random.default_rng(4).random((3, 1, *form)) > 0.3
    visible[0, 0, [0, form[0] // 3, -1]], visible[1], visible[:, :, :, 5] = False, False, False
    bias = np.where(visible, 0, -np.inf).astype("float64" if dtype == "float64" else "float32")
    found = check_backward(*inputs, bias=visible if of == "bool" else bias)
    assert (found["q"][~visible[:, 0].any(axis=2)].astype(float) == 0).all()
    for gradient in (found["k"], found["v"]):
        assert (gradient[~visible[:, 0].any(axis=1)].astype(float) == 0).all()
    if of == "-inf":
        assert (found["bias"][~visible] == 0).all()


@pytest.mark.parametrize("seen", [slice(0, 3), slice(-3, None), slice(20, 23)])
def test_a_few_visible_keys_among_many(seen, inputs, form, check_backward):
    visible = np.zeros(form, bool)
    visible[:, seen] = True
    check_backward(*inputs, bias=visible)


def test_packed_documents_are_separate_calls(dtype, draw, check_backward):
    lengths = [1, 30, 64, 5]
    do, q, k, v = (draw(dtype, 1, 100, heads, 16) for heads in (4, 4, 2, 2))
    found = check_backward(do, q, k, v, mask=document(packed(*lengths)), causal=True)
    for end, n in zip(np.cumsum(lengths), lengths, strict=True):
        part = slice(end - n, end)
        pieces = [x[:, part] for x in (q, k, v)]
        results = reference.attention(*pieces, causal=True, return_lse=True)
        expected = reference.attention_backward(do[:, part], *pieces, *results, causal=True)
        tolerance = {"float64": 1e-12, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[dtype]
        for name, gradient in zip("qkv", expected, strict=True):
            np.testing.assert_allclose(
                found[name][:, part].astype(float), gradient, rtol=tolerance, atol=tolerance
            )
