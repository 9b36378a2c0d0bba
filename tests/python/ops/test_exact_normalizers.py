"""What takes the place of softmax: sigmoid, softplus, powers of ReLU and of magnitudes, few queries and many."""

import numpy as np
import pytest

import subquad
from subquad.masks import causal, document, padding, prefix
from subquad.normalizers import Power, ReLU, Sigmoid, Softplus

NORMALIZERS = {
    "sigmoid": Sigmoid(),
    "sigmoid of a sequence": Sigmoid(-np.log(100)),
    "softplus": Softplus(),
    "softplus cubed": Softplus(reweight=3),
    "softplus to the 15th": Softplus(reweight=15),
    "relu": ReLU(),
    "relu undivided": ReLU(normalize=False),
    "relu squared": ReLU(2),
    "relu squared undivided": ReLU(2, normalize=False),
    "power 2": Power(2),
    "power 4": Power(4),
    "power 1.5": Power(1.5),
    "power 1": Power(1),
}
FORMS = {"many": (70, 110), "more queries": (50, 33), "few": (2, 700), "one": (1, 65)}


@pytest.fixture(params=FORMS)
def form(request):
    """Numbers of queries and keys."""
    return FORMS[request.param]


@pytest.fixture
def inputs(dtype, draw, form):
    """`q`, `k` and `v` of these lengths, 4 heads, 2 of keys."""
    queries, keys = form
    return draw(dtype, 2, queries, 4, 32), draw(dtype, 2, keys, 2, 32), draw(dtype, 2, keys, 2, 20)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (30, 2)},
        {"mask": padding([33, 20], [3, 0]) & (causal() | prefix(9))},
        {"scale": 0.9, "softcap": 2.0},
        {"alibi_slopes": np.array([0.2, 0.1, 0.05, 0.0], np.float32)},
    ],
    ids=str,
)
def test_normalizer(name, options, inputs, check_attention):
    out = np.full((*inputs[0].shape[:3], 20), np.nan, inputs[0].dtype)
    # A score rounded once changes its power that many times as much.
    check_attention(*inputs, normalizer=NORMALIZERS[name], scores=80.0, out=out, **options)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_biases(name, inputs, form, dtype, draw, check_attention):
    accumulator = "float64" if dtype == "float64" else "float32"
    normalizer = NORMALIZERS[name]
    shown = np.random.default_rng(2).random((2, 1, *form)) > 0.4
    bias = draw(accumulator, 1, 4, *form)
    # A bias of -inf hides, whatever the weight of -inf would be.
    for given in (shown, bias, np.where(shown, bias, -np.inf).astype(accumulator)):
        check_attention(*inputs, normalizer=normalizer, bias=given, scores=80.0)
    check_attention(
        *inputs, normalizer=normalizer, relative_bias=draw(accumulator, 4, sum(form) - 1), scores=80.0
    )


@pytest.mark.parametrize("name", NORMALIZERS)
def test_rows_without_keys_are_zero(name, inputs):
    normalizer = NORMALIZERS[name]
    for options in (
        {"mask": padding(0)},
        {"bias": np.zeros(1, bool)},
        {"mask": document([1], [2]) & padding(9)},
    ):
        q, k, v = inputs
        if "mask" in options and "document" in repr(options["mask"]):
            q, k, v = q[:, :1], k[:, :1], v[:, :1]
        out, lse = subquad.attention(q, k, v, normalizer=normalizer, return_lse=True, **options)
        assert (out.astype(np.float64) == 0).all()
        assert np.isneginf(lse).all()


@pytest.mark.parametrize("normalizer", [ReLU(), ReLU(2), ReLU(normalize=False), Power(2), Power(1)], ids=repr)
def test_weights_that_sum_to_nothing(normalizer, inputs):
    q, k, v = inputs
    out, lse = subquad.attention(0 * q, k, v, normalizer=normalizer, return_lse=True)
    assert (out.astype(np.float64) == 0).all()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hidden_keys_do_not_leak(bad, name, inputs, check_attention):
    q, k, v = (x.copy() for x in inputs)
    k[:, -7:], v[:, -7:] = 0, 0
    clean = q, k.copy(), v.copy()
    k[:, -7:], v[:, -7:] = bad, bad
    mask = padding(k.shape[1] - 7)
    check_attention(q, k, v, clean=clean, normalizer=NORMALIZERS[name], mask=mask, scores=80.0)


@pytest.mark.parametrize("normalizer", [Sigmoid(), Softplus(), ReLU(), Power(1)], ids=repr)
def test_large_scores(normalizer, dtype, draw, check_attention):
    q, k, v = draw(dtype, 1, 40, 2, 16, width=30), draw(dtype, 1, 60, 2, 16), draw(dtype, 1, 60, 2, 8)
    scores = float(np.abs(np.einsum("bqhd,bkhd->bhqk", q.astype(float), k.astype(float))).max()) / 4
    check_attention(q, k, v, normalizer=normalizer, scores=scores)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("queries", [2, 300])
def test_threads_do_not_change_bits(queries, name, dtype, draw, keep_num_threads):
    q, k, v = draw(dtype, 1, queries, 2, 32), draw(dtype, 1, 1500, 2, 32), draw(dtype, 1, 1500, 2, 32)
    results = []
    for threads in (1, 3, 5):
        subquad.set_num_threads(threads)
        results.append(subquad.attention(q, k, v, normalizer=NORMALIZERS[name], causal=True, return_lse=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])
