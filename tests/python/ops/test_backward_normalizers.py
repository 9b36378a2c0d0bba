"""Gradients through what takes the place of softmax, few queries and many."""

import numpy as np
import pytest

import subquad
from subquad.masks import causal, padding, prefix
from subquad.normalizers import Power, ReLU, Sigmoid, Softplus

NORMALIZERS = [
    Sigmoid(),
    Sigmoid(-4.6),
    Softplus(),
    ReLU(),
    ReLU(normalize=False),
    ReLU(2),
    ReLU(2, normalize=False),
    Power(2),
    Power(4),
    Power(1.5),
    Power(1),
]
FORMS = {"many": (40, 70), "more queries": (50, 33), "few": (2, 100)}


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`do`, `q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return (
        draw(dtype, 2, queries, 4, 20),
        draw(dtype, 2, queries, 4, 16),
        draw(dtype, 2, keys, 2, 16),
        draw(dtype, 2, keys, 2, 20),
    )


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"mask": padding([33, 20], [3, 0]) & (causal() | prefix(9)), "window_size": (30, 20)},
        {"scale": 0.9, "softcap": 2.0},
    ],
    ids=str,
)
def test_normalizer(options, normalizer, inputs, check_backward):
    check_backward(*inputs, normalizer=normalizer, **options)


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_tables(normalizer, inputs, form, dtype, draw, check_backward):
    accumulator = "float64" if dtype == "float64" else "float32"
    shown = np.random.default_rng(2).random((2, 1, *form)) > 0.4
    bias = np.where(shown, draw(accumulator, 1, 4, *form), -np.inf).astype(accumulator)
    found = check_backward(
        *inputs,
        normalizer=normalizer,
        dlse=draw(accumulator, 2, 4, form[0]) / 8,
        bias=bias,
        relative_bias=draw(accumulator, 4, sum(form) - 1),
        alibi_slopes=np.array([0.2, 0.1, 0.05, 0.0], np.float32),
    )
    assert (found["bias"][np.isneginf(bias)] == 0).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_hidden_does_not_leak(bad, normalizer, dtype, draw, check_backward):
    do, q = draw(dtype, 1, 20, 2, 8), draw(dtype, 1, 20, 2, 16)
    k, v = draw(dtype, 1, 40, 1, 16), draw(dtype, 1, 40, 1, 8)
    clean = do, q, k.copy(), v.copy()
    k[:, -7:], v[:, -7:] = bad, bad
    found = check_backward(do, q, k, v, clean=clean, normalizer=normalizer, mask=padding(33))
    assert (found["k"][:, -7:].astype(float) == 0).all()
    assert (found["v"][:, -7:].astype(float) == 0).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_rows_without_keys(normalizer, inputs, check_backward):
    found = check_backward(*inputs, normalizer=normalizer, mask=padding(0))
    assert all((x.astype(float) == 0).all() for x in found.values())


@pytest.mark.parametrize("normalizer", [x for x in NORMALIZERS if isinstance(x, ReLU | Power)], ids=repr)
def test_weights_that_sum_to_nothing(normalizer, inputs, dtype, draw, form):
    do, q, k, v = inputs
    dlse = draw("float64" if dtype == "float64" else "float32", 2, 4, form[0])
    results = subquad.attention(0 * q, k, v, normalizer=normalizer, return_lse=True)
    gradients = subquad.attention_backward(do, 0 * q, k, v, *results, dlse=dlse, normalizer=normalizer)
    # Their output is 0 by definition, not by way of the scores.
    assert all((x.astype(float) == 0).all() for x in gradients)


@pytest.mark.parametrize("normalizer", [Sigmoid(), Softplus(), ReLU(), Power(1)], ids=repr)
def test_large_scores(normalizer, dtype, draw, check_backward):
    do, q = draw(dtype, 1, 30, 2, 8), draw(dtype, 1, 30, 2, 16, width=30)
    check_backward(do, q, draw(dtype, 1, 40, 2, 16), draw(dtype, 1, 40, 2, 8), normalizer=normalizer)
