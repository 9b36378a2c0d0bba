"""NaN and infinities: hidden ones reach no gradient, visible ones those of softmax."""

import numpy as np
import pytest

import subquad
from subquad import masks, reference

QUERIES, KEYS, HIDDEN = 40, 90, [0, 3, 17, 31, 32, 48, 49, 88, 89]
BLIND = [0, 7, 16, 39]


def of_softmax(accumulator, visible):
    return {"bias": np.where(visible, 0, -np.inf).astype(accumulator)}


# What hides the keys and queries above.
HIDING = {
    "boolean": lambda accumulator, visible: {"bias": visible},
    "-inf": of_softmax,
    "documents": lambda accumulator, visible: {
        "mask": masks.document(
            np.where(np.isin(np.arange(QUERIES), BLIND), 2, 0),
            np.where(np.isin(np.arange(KEYS), HIDDEN), 1, 0),
        )
    },
    "everything": lambda accumulator, visible: {
        **of_softmax(accumulator, visible),
        "alibi_slopes": np.full(4, 0.1, np.float32),
        "relative_bias": np.ones((4, QUERIES + KEYS - 1), accumulator),
        "sinks": np.ones(4, accumulator),
        "softcap": 3.0,
        "scale": np.full((4, 1), 0.3, accumulator),
    },
}


@pytest.fixture
def accumulator(dtype):
    """The dtype of scores."""
    return "float64" if dtype == "float64" else "float32"


@pytest.fixture
def inputs(dtype, draw):
    """`do`, `q`, `k` and `v`, 4 heads, 2 of keys."""
    return (
        draw(dtype, 2, QUERIES, 4, 12),
        draw(dtype, 2, QUERIES, 4, 16),
        draw(dtype, 2, KEYS, 2, 16),
        draw(dtype, 2, KEYS, 2, 12),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "do", "q", "do q k v"])
@pytest.mark.parametrize("hiding", HIDING)
def test_what_is_hidden_does_not_leak(hiding, where, bad, inputs, accumulator, check_backward):
    visible = np.ones((QUERIES, KEYS), bool)
    visible[BLIND], visible[:, HIDDEN] = False, False
    arrays = dict(zip(("do", "q", "k", "v"), (x.copy() for x in inputs), strict=True))
    for name in where.split():
        arrays[name][:, HIDDEN if name in {"k", "v"} else BLIND] = bad
    found = check_backward(*arrays.values(), clean=inputs, **HIDING[hiding](accumulator, visible))
    for hidden in (found["q"][:, BLIND], found["k"][:, HIDDEN], found["v"][:, HIDDEN]):
        assert (hidden.astype(float) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e4])
@pytest.mark.parametrize("where", ["k", "kv"])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (4, 600)])
def test_future_keys_do_not_leak(queries, keys, where, bad, dtype, draw, check_backward):
    do, q = draw(dtype, 1, queries, 2, 8), draw(dtype, 1, queries, 2, 16)
    k, v = draw(dtype, 1, keys, 1, 16), draw(dtype, 1, keys, 1, 8)
    # Only the last queries see the last keys; their own gradients are another matter.
    for rows in (1, queries - 1):
        seen = keys - queries + rows
        arrays = do[:, :rows], q[:, :rows], k, v
        expected = check_backward(*arrays, mask=masks.padding(seen) & masks.sliding_window(None, queries))
        dirty = {"k": k.copy(), "v": v.copy()}
        for name in where:
            dirty[name][:, seen:] = bad
        given = do[:, :rows], q[:, :rows], dirty["k"], dirty["v"]
        found = check_backward(
            *given, clean=arrays, mask=masks.padding(seen) & masks.sliding_window(None, queries)
        )
        for name in "qkv":
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("place", ["do", "q", "k", "v", "dlse"])
def test_visible_nan_propagates(place, inputs, dtype, accumulator, draw):
    dlse = draw(accumulator, 2, 4, QUERIES)
    arrays = {**dict(zip(("do", "q", "k", "v"), (x.copy() for x in inputs), strict=True)), "dlse": dlse}
    arrays[place][1, 1, 1] = np.nan
    do, q, k, v, dlse = arrays.values()
    results = subquad.attention(q, k, v, causal=True, return_lse=True)
    found = subquad.attention_backward(do, q, k, v, *results, dlse=dlse, causal=True)
    exact = reference.attention(q, k, v, causal=True, return_lse=True)
    expected = reference.attention_backward(do, q, k, v, *exact, dlse=dlse, causal=True)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.isnan(x.astype(float)), np.isnan(y))
    assert np.isnan(expected[0]).any()
