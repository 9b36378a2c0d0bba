"""The oracles against the equation, written out, and against PyTorch in float64."""

import math

import numpy as np
import pytest
import torch

from subquad import reference

MASKS = {
    "none": None,
    "bool": np.random.default_rng(1).random((4, 5, 7)) > 0.4,
    "float": np.ones((2, 1, 1, 7)) / 3,
}


def by_hand(q, k, v, *, causal, scale, bias):
    """Returns output and log-sum-exp, one query at a time, in Python's numbers."""
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, queries, heads, v.shape[3])), np.full((batch, heads, queries), -np.inf)
    bias = None if bias is None else np.broadcast_to(bias, (batch, heads, queries, keys))
    for b, i, h in np.ndindex(batch, queries, heads):
        weights = {}
        for j in range(keys):
            if causal and j > i + keys - queries:
                continue
            score = scale * sum(
                float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, h // group], strict=True)
            )
            if bias is not None:
                if bias.dtype == bool and not bias[b, h, i, j]:
                    continue
                score += 0.0 if bias.dtype == bool else float(bias[b, h, i, j])
            weights[j] = math.exp(score)
        if weights:
            total = sum(weights.values())
            lse[b, h, i] = math.log(total)
            out[b, i, h] = sum(
                weight / total * v[b, j, h // group].astype(float) for j, weight in weights.items()
            )
    return out, lse


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(5, 7, 4), (5, 7, 2), (5, 7, 1)])
def test_attention_is_the_equation(queries, keys, kv_heads, scale, causal, mask, draw):
    q = draw("float32", 2, queries, 4, 3)
    k, v = draw("float32", 2, keys, kv_heads, 3), draw("float32", 2, keys, kv_heads, 2)
    options = {"causal": causal, "scale": scale, "bias": MASKS[mask]}
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = by_hand(q, k, v, **options)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(reference.attention(q, k, v, **options), out)


def test_causal_is_drawn_in_the_documentation():
    # Value j is a unit vector: the output shows who sees whom.
    def seen(queries, keys):
        v = np.eye(keys)[None, :, None]
        return (
            reference.attention(np.zeros((1, queries, 1, 1)), np.zeros((1, keys, 1, 1)), v, causal=True)[
                0, :, 0
            ]
            > 0
        )

    np.testing.assert_array_equal(seen(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(seen(4, 2), [[0, 0], [0, 0], [1, 0], [1, 1]])


def test_sdpa_is_causal_from_the_top_left():
    v = np.eye(4)
    out = reference.scaled_dot_product_attention(np.zeros((2, 1)), np.zeros((4, 1)), v, is_causal=True)
    np.testing.assert_array_equal(out > 0, [[1, 0, 0, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}], ids=str
)
def test_sdpa_is_torchs(options, draw):
    options = dict(options)
    arrays = [draw("float64", 2, 4, 5, 3), draw("float64", 2, 2, 7, 3), draw("float64", 1, 2, 7, 6)]
    mask = MASKS[options.pop("mask", "none")]
    out = reference.scaled_dot_product_attention(*arrays, mask, enable_gqa=True, **options)
    tensors = [torch.from_numpy(x) for x in arrays]
    tensors[2] = tensors[2].expand(2, 2, 7, 6)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *tensors, None if mask is None else torch.from_numpy(mask), enable_gqa=True, **options
    )
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-13, atol=1e-13)


def test_both_oracles_agree(draw):
    q, k, v = draw("float64", 2, 6, 4, 8), draw("float64", 2, 6, 2, 8), draw("float64", 2, 6, 2, 3)
    out = reference.attention(q, k, v, causal=True)
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    other = reference.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(other.swapaxes(1, 2), out, rtol=1e-14, atol=1e-14)


def test_half_types_are_widened_exactly(draw):
    for dtype in ("float16", "bfloat16"):
        q, k, v = draw(dtype, 1, 3, 1, 8), draw(dtype, 1, 5, 1, 8), draw(dtype, 1, 5, 1, 8)
        wide = reference.attention(*(x.astype(np.float64) for x in (q, k, v)))
        np.testing.assert_array_equal(reference.attention(q, k, v), wide)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_hidden_values_do_not_count_and_visible_ones_do(bad, draw):
    q, k, v = draw("float64", 1, 6, 1, 4), draw("float64", 1, 6, 1, 4), draw("float64", 1, 6, 1, 4)
    expected = reference.attention(q, k, v, causal=True)
    k, v = k.copy(), v.copy()
    k[:, 3:], v[:, 3:] = bad, bad
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(out[:, :3], expected[:, :3])
    assert np.isfinite(lse[:, :, :3]).all()
    assert not np.isfinite(out[:, 3:]).any()


def test_large_scores_do_not_overflow(draw):
    q, k, v = draw("float64", 1, 3, 1, 4, width=1e6), draw("float64", 1, 5, 1, 4), draw("float64", 1, 5, 1, 4)
    out, lse = reference.attention(q, k, v, return_lse=True)
    best = np.argmax(np.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)[0, 0]
    np.testing.assert_allclose(out[0, :, 0], v[0, best, 0])
    assert np.isfinite(lse).all()


@pytest.mark.parametrize(
    "shapes", [((1, 3, 2, 4), (1, 0, 2, 4)), ((1, 0, 2, 4), (1, 5, 2, 4)), ((0, 3, 2, 4), (0, 5, 2, 4))]
)
def test_empty(shapes):
    q, k = (np.zeros(shape) for shape in shapes)
    out, lse = reference.attention(q, k, k, return_lse=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert np.isneginf(lse).all() == (k.shape[1] == 0 or lse.size == 0)


def test_width_zero():
    # The sum over no products is 0, whatever its factor: all keys weigh the same.
    v = np.arange(4.0).reshape(1, 4, 1, 1)
    assert reference.attention(np.zeros((1, 1, 1, 0)), np.zeros((1, 4, 1, 0)), v).item() == 1.5
    out = reference.scaled_dot_product_attention(np.zeros((1, 0)), np.zeros((4, 0)), v.reshape(4, 1))
    assert out.item() == 1.5
