"""The oracle's windows, masks, score modifiers, sinks and normalizers against the equations, written out, and against PyTorch."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from subquad import masks, normalizers, reference

B, SQ, SK, H, HKV, D, DV = 2, 5, 8, 4, 2, 3, 2
SHIFT = SK - SQ
GENERATOR = np.random.default_rng(7)


def numbers(*shape, width=1.0):
    return GENERATOR.standard_normal(shape) * width


Q, K, V = numbers(B, SQ, H, D, width=2), numbers(B, SK, HKV, D), numbers(B, SK, HKV, DV)


def by_hand(score, visible, *, sink=None, weight=math.exp, divide=True):
    """Output and log-sum-exp, one query at a time, in Python's numbers.

    Args:
        score: from the raw product of query and key to the score, `score(product, b, h, i, j)`.
        visible: `visible(b, h, i, j)`.
        sink: `sink(b, h, i)`.
        weight: of a score.
        divide: whether weights are divided by their sum.
    """
    out, lse = np.zeros((B, SQ, H, DV)), np.full((B, H, SQ), -np.inf)
    for b, h, i in np.ndindex(B, H, SQ):
        total = 0.0 if sink is None else weight(sink(b, h, i))
        for j in range(SK):
            if visible(b, h, i, j):
                product = math.fsum(Q[b, i, h] * K[b, j, h // 2])
                w = weight(score(product, b, h, i, j))
                total += w
                out[b, i, h] += w * V[b, j, h // 2]
        if total > 0:
            lse[b, h, i] = math.log(total)
            out[b, i, h] /= total if divide else 1
    return out, lse


def scaled(product, *_):
    return product * D**-0.5


def everything(*_):
    return True


def check(options, score=scaled, visible=everything, **rest):
    out, lse = reference.attention(Q, K, V, return_lse=True, **options)
    expected, expected_lse = by_hand(score, visible, **rest)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("left", "right"), [(0, 0), (2, 0), (0, 3), (1, 2), (None, 1), (2, None), (None, None), (100, 100)]
)
def test_window(left, right, causal):
    def visible(_b, _h, i, j):
        after = math.inf if right is None else right
        before = math.inf if left is None else left
        return -before <= j - (i + SHIFT) <= (min(after, 0) if causal else after)

    check({"window_size": (left, right), "causal": causal}, visible=visible)
    if left is not None:
        check({"window_size": [np.int32(left), right], "causal": causal}, visible=visible)


def test_windows_of_heads():
    sides = [(0, 0), (2, 1), (None, 0), (3, None)]

    def visible(_b, h, i, j):
        left, right = (math.inf if side is None else side for side in sides[h])
        return -left <= j - (i + SHIFT) <= right

    check({"window_size": sides}, visible=visible)
    array = np.array([[-1 if side is None else side for side in pair] for pair in sides])
    for window_size in (array, array.astype(np.int32), torch.from_numpy(array)):
        check({"window_size": window_size}, visible=visible)


def test_windows_are_drawn_in_the_documentation():
    def seen(queries, keys, window_size):
        out = reference.attention(
            np.zeros((1, queries, 1, 1)),
            np.zeros((1, keys, 1, 1)),
            np.eye(keys)[None, :, None],
            window_size=window_size,
        )
        return (out[0, :, 0] > 0).astype(int).tolist()

    assert seen(2, 4, (1, 0)) == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert seen(2, 4, (1, 1)) == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert seen(4, 2, (1, 0)) == [[0, 0], [0, 0], [1, 0], [1, 1]]
    assert seen(4, 2, (1, 1)) == [[0, 0], [1, 0], [1, 1], [1, 1]]


def test_mask_object():
    lengths = [8, 5]

    def visible(b, _h, i, j):
        return j < lengths[b] and (j // 3 == (i + SHIFT) // 3 or j < 1)

    check({"mask": masks.padding(lengths) & (masks.chunked(3) | masks.prefix(1))}, visible=visible)


def test_mask_window_and_causal_join():
    def visible(_b, _h, i, j):
        return i + SHIFT - 3 <= j <= i + SHIFT and j // 4 <= (i + SHIFT) // 4 and j != 4

    bias = np.arange(SK) != 4
    check(
        {"mask": masks.block_causal(4), "window_size": (3, 1), "causal": True, "bias": bias}, visible=visible
    )


@pytest.mark.parametrize("shape", [(), (SQ,), (H, 1), (B, 1, 1), (1, H, SQ), (B, H, SQ)], ids=str)
def test_scale(shape):
    scale = np.abs(numbers(*shape)) if shape else 0.7
    wide = np.broadcast_to(scale, (B, H, SQ))
    check({"scale": scale}, score=lambda product, b, h, i, _: product * wide[b, h, i])


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap(cap):
    check({"softcap": cap}, score=lambda product, *_: cap * math.tanh(scaled(product) / cap))


@pytest.mark.parametrize("shape", [(H,), (B, H)], ids=str)
def test_alibi(shape):
    slopes = numbers(*shape)
    wide = np.broadcast_to(slopes, (B, H))
    check(
        {"alibi_slopes": slopes},
        score=lambda product, b, h, i, j: scaled(product) - wide[b, h] * abs(i + SHIFT - j),
    )


@pytest.mark.parametrize("rows", [1, H])
def test_relative_bias(rows):
    biases = numbers(rows, SQ + SK - 1)
    check(
        {"relative_bias": biases},
        score=lambda product, _b, h, i, j: scaled(product) + biases[h % rows, j - i + SQ - 1],
    )


def test_the_order_of_modifiers():
    slopes, bias, diagonals = numbers(H), numbers(B, 1, SQ, SK), numbers(H, SQ + SK - 1)

    def score(product, b, h, i, j):
        s = 1.5 * math.tanh(0.9 * product / 1.5)
        return s - slopes[h] * abs(i + SHIFT - j) + bias[b, 0, i, j] + diagonals[h, j - i + SQ - 1]

    options = {"softcap": 1.5, "alibi_slopes": slopes, "bias": bias, "relative_bias": diagonals, "scale": 0.9}
    check(options, score=score)


@pytest.mark.parametrize("shape", [(H,), (1, SQ), (H, 1), (B, 1, SQ), (B, H, SQ)], ids=str)
def test_sinks(shape):
    sinks = numbers(*shape)
    wide = np.broadcast_to(sinks[:, None] if len(shape) == 1 else sinks, (B, H, SQ))
    options = {"sinks": sinks, "window_size": (1, None)}
    check(
        options,
        visible=lambda _b, _h, i, j: i + SHIFT - 1 <= j,
        sink=lambda b, h, i: wide[b, h, i],
    )


def test_a_sink_is_a_key_without_a_value():
    sinks = numbers(H)
    k, v = np.concatenate([K, K[:, :1]], axis=1), np.concatenate([V, 0 * V[:, :1]], axis=1)
    bias = np.zeros((1, H, SQ, SK + 1))
    product = np.einsum("bihd,bhd->bhi", Q, np.repeat(K[:, 0], 2, axis=1)) * D**-0.5
    bias = np.concatenate([np.zeros((B, H, SQ, SK)), (sinks[:, None] - product)[..., None]], axis=-1)
    expected, expected_lse = reference.attention(Q, k, v, bias=bias, return_lse=True)
    out, lse = reference.attention(Q, K, V, sinks=sinks, return_lse=True)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)


def test_rows_without_keys_and_sinks():
    out, lse = reference.attention(Q, K[:, :3], V[:, :3], causal=True, sinks=np.arange(4.0), return_lse=True)
    assert (out[:, :2] == 0).all()
    np.testing.assert_array_equal(lse[:, :, :2], np.broadcast_to(np.arange(4.0)[:, None], (2, 4, 2)))
    nothing = reference.attention(Q, K, V, sinks=np.full(4, -np.inf), return_lse=True)
    for found, expected in zip(nothing, reference.attention(Q, K, V, return_lse=True), strict=True):
        np.testing.assert_array_equal(found, expected)
    out, lse = reference.attention(
        Q, K[:, :3], V[:, :3], causal=True, sinks=np.full(4, -np.inf), return_lse=True
    )
    assert (out[:, :2] == 0).all()
    assert np.isneginf(lse[:, :, :2]).all()


def test_length_scale_counts_keys_but_not_by_bias():
    factors = np.arange(SK + 1) + 0.5
    lengths = [8, 6]

    def visible(b, _h, i, j):
        return i + SHIFT - 3 <= j <= i + SHIFT and j < lengths[b]

    def score(product, b, h, i, _):
        return scaled(product) * factors[sum(visible(b, h, i, j) for j in range(SK))]

    options = {
        "length_scale": factors,
        "causal": True,
        "window_size": (3, None),
        "mask": masks.padding(lengths),
    }
    check(options, score=score, visible=visible)
    bias = np.arange(SK) % 2 == 0
    check(
        options | {"bias": bias},
        score=score,
        visible=lambda b, h, i, j: visible(b, h, i, j) and j % 2 == 0,
    )


NORMALIZERS = {
    "sigmoid": (normalizers.Sigmoid(-1.5), lambda s: 1 / (1 + math.exp(1.5 - s)), False),
    "softplus": (normalizers.Softplus(), lambda s: math.log1p(math.exp(s)), True),
    "relu": (normalizers.ReLU(), lambda s: max(s, 0.0), True),
    "relu squared": (normalizers.ReLU(2, normalize=False), lambda s: max(s, 0.0) ** 2, False),
    "power": (normalizers.Power(4), lambda s: s**4, True),
    "odd power": (normalizers.Power(1.5), lambda s: abs(s) ** 1.5, True),
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizer(name):
    normalizer, weight, divide = NORMALIZERS[name]
    check({"normalizer": normalizer}, weight=weight, divide=divide)
    diagonals = numbers(H, SQ + SK - 1)
    check(
        {"normalizer": normalizer, "causal": True, "window_size": (1, 1), "relative_bias": diagonals},
        score=lambda product, _b, h, i, j: scaled(product) + diagonals[h, j - i + SQ - 1],
        visible=lambda _b, _h, i, j: -1 <= j - i - SHIFT <= 0,
        weight=weight,
        divide=divide,
    )
    # What a bias of numbers hides does not count, although 0 and -inf have weights of their own under some.
    bias = np.where(np.arange(SK) % 2 == 0, 0.3, -np.inf)
    check(
        {"normalizer": normalizer, "bias": bias},
        score=lambda product, *_: scaled(product) + 0.3,
        visible=lambda _b, _h, _i, j: j % 2 == 0,
        weight=weight,
        divide=divide,
    )


@pytest.mark.parametrize("power", [1.5, 15.0])
@pytest.mark.parametrize("keys", [2, 3, 4, 8])
def test_reweighted_softplus(keys, power):
    # A key that a bias hides counts among those that are seen.
    bias = np.where(np.arange(keys) == 1, -np.inf, 0.0)
    normalizer = normalizers.Softplus(reweight=power)
    out, lse = reference.attention(
        Q, K[:, :keys], V[:, :keys], bias=bias, normalizer=normalizer, return_lse=True
    )
    shown = [j for j in range(keys) if j != 1]
    threshold = 0 if keys <= 3 else 1
    for b, h, i in np.ndindex(B, H, SQ):
        weights = [math.log1p(math.exp(scaled(math.fsum(Q[b, i, h] * K[b, j, h // 2])))) for j in shown]
        weights = [max(keys * w / math.fsum(weights) - threshold, 0) ** power for w in weights]
        total = math.fsum(weights)
        expected = sum(w * V[b, j, h // 2] for w, j in zip(weights, shown, strict=True)) / total
        np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-10)
        np.testing.assert_allclose(lse[b, h, i], math.log(total), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_rows_without_weights(name):
    normalizer = NORMALIZERS[name][0]
    out, lse = reference.attention(Q, K[:, :3], V[:, :3], causal=True, normalizer=normalizer, return_lse=True)
    assert (out[:, :2] == 0).all()
    assert np.isneginf(lse[:, :, :2]).all()


@pytest.mark.parametrize(
    "normalizer", [normalizers.ReLU(), normalizers.ReLU(2), normalizers.Power(2)], ids=repr
)
def test_weights_that_sum_to_nothing(normalizer):
    out, lse = reference.attention(0 * Q, K, V, normalizer=normalizer, return_lse=True)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_normalizers_at_large_scores():
    q, k, v = (
        np.full((1, 1, 1, 1), 800.0),
        np.array([1.0, -1.0]).reshape(1, 2, 1, 1),
        np.array([[[[2.0]], [[3.0]]]]),
    )
    sigmoid = reference.attention(q, k, v, normalizer=normalizers.Sigmoid(), scale=1.0)
    softplus = reference.attention(q, k, v, normalizer=normalizers.Softplus(), scale=1.0)
    assert sigmoid.item() == softplus.item() == 2.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (2, 0)},
        {"mask": masks.sliding_window(2)},
        {"window_size": (2, 0), "softcap": 2.0, "sinks": np.ones(4), "alibi_slopes": np.ones(4)},
        *({"window_size": (2, 0), "normalizer": normalizer} for normalizer, _, _ in NORMALIZERS.values()),
    ],
    ids=str,
)
def test_what_is_hidden_does_not_count(options, bad):
    expected, expected_lse = reference.attention(Q, K, V, return_lse=True, **options)
    k, v = K.copy(), V.copy()
    # The first query sees the keys 1 to 3, the last one 5 to 7.
    k[:, 0], v[:, 0], k[:, 4:], v[:, 4:] = bad, bad, bad, bad
    out, lse = reference.attention(Q, k, v, return_lse=True, **options)
    np.testing.assert_array_equal(out[:, 0], expected[:, 0])
    np.testing.assert_array_equal(lse[:, :, 0], expected_lse[:, :, 0])
    # Later queries see it. Infinities of one sign may leave a row without weights, and so with zeros.
    assert not np.isfinite(out[:, 1:]).all()


FLEX = {
    "softcap": (
        {"softcap": 1.5},
        lambda s, b, h, i, j: 1.5 * torch.tanh(s / 1.5),
    ),
    "alibi": (
        {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.1])},
        lambda s, b, h, i, j: s - torch.tensor([0.5, 0.25, 0.125, 0.1]).double()[h] * (i + SHIFT - j).abs(),
    ),
    "window": (
        {"window_size": (2, 1)},
        lambda s, b, h, i, j: torch.where((i + SHIFT - j <= 2) & (j - i - SHIFT <= 1), s, -torch.inf),
    ),
    "chunked causal": (
        {"mask": masks.chunked(3) & masks.causal()},
        lambda s, b, h, i, j: torch.where(((i + SHIFT) // 3 == j // 3) & (j <= i + SHIFT), s, -torch.inf),
    ),
}


@pytest.mark.parametrize("name", FLEX)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees(name):
    options, score_mod = FLEX[name]
    out = reference.attention(Q, K, V, **options)
    tensors = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in (Q, K, V)]
    expected = flex_attention(*tensors, score_mod=score_mod, enable_gqa=True)
    np.testing.assert_allclose(out, expected.transpose(1, 2).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("paged", [False, True])
def test_varlen_is_one_sequence_after_the_other(paged):
    # An empty sequence, one without keys, one with more queries than keys.
    lengths_q, lengths_k = [3, 0, 2, 4], [7, 2, 0, 2]
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths_q, lengths_k))
    q, k, v = numbers(9, H, D), numbers(11, HKV, D), numbers(11, HKV, DV)
    slopes, sinks = numbers(4, H), numbers(H)
    arguments, pages = [k, v], {}
    if paged:
        table = GENERATOR.permutation(20).reshape(4, 5)
        arguments = [np.full((20, 2, *x.shape[1:]), np.nan) for x in (k, v)]
        for b, length in enumerate(lengths_k):
            for j in range(length):
                for page, x in zip(arguments, (k, v), strict=True):
                    page[table[b, j // 2], j % 2] = x[cu_k[b] + j]
        pages = {"block_table": table}
    out, lse = reference.attention_varlen(
        q,
        *arguments,
        cu_q,
        cu_k,
        causal=True,
        window_size=(2, -1),
        softcap=2.0,
        alibi_slopes=slopes,
        sinks=sinks,
        softmax_scale=0.8,
        **pages,
    )
    for b in range(4):
        one_q, one_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        expected, expected_lse = reference.attention(
            q[None, one_q],
            k[None, one_k],
            v[None, one_k],
            causal=True,
            window_size=(2, None),
            softcap=2.0,
            alibi_slopes=slopes[b],
            sinks=sinks,
            scale=0.8,
            return_lse=True,
        )
        np.testing.assert_array_equal(out[one_q], expected[0])
        np.testing.assert_array_equal(lse[:, one_q], expected_lse[0])
