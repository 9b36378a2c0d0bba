"""Dropout: the same weights in forward and backward, whatever the form, the level and the number of threads."""

import numpy as np
import pytest
import torch

import subquad
from subquad import masks, normalizers, reference
from subquad.reference.dropout import dropout_factors

SHAPES = {
    "decode": (2, 1, 300, 4, 2, 32, 32),
    "odd": (1, 3, 7, 2, 1, 8, 20),
    "prefill": (2, 65, 130, 4, 2, 24, 40),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window and soft-cap": {"window_size": (20, 5), "softcap": 3.0},
    "sigmoid": {"normalizer": normalizers.Sigmoid()},
    "padding": {"mask": masks.padding(5)},
}


def _inputs(shape, dtype=np.float64):
    batch, queries, keys, heads, kv_heads, width, width_v = shape
    rng = np.random.default_rng(0)
    q, do = rng.normal(size=(batch, queries, heads, width)), rng.normal(size=(batch, queries, heads, width_v))
    k, v = rng.normal(size=(batch, keys, kv_heads, width)), rng.normal(size=(batch, keys, kv_heads, width_v))
    return [x.astype(dtype) for x in (q, k, v, do)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_the_oracle(shape, options):
    q, k, v, do = _inputs(shape)
    options = {**options, "dropout_p": 0.3, "dropout_seed": 2**63 + 12345}
    out, lse = subquad.attention(q, k, v, return_lse=True, **options)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-9)
    got = subquad.attention_backward(do, q, k, v, out, lse, **options)
    for grad, want in zip(got, reference.attention_backward(do, q, k, v, out, lse, **options), strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(dtype):
    arrays = [torch.from_numpy(x).to(dtype) for x in _inputs(SHAPES["prefill"])]
    q, k, v, do = arrays
    options = {"causal": True, "dropout_p": 0.5, "dropout_seed": 7}
    out, lse = subquad.attention(q, k, v, return_lse=True, **options)
    got = subquad.attention_backward(do, q, k, v, out, lse, **options)
    wide = [x.double().numpy() for x in arrays]
    expected = reference.attention(*wide[:3], **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(out.double(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)
    known = reference.attention_backward(
        wide[3], *wide[:3], out.double().numpy(), lse.double().numpy(), **options
    )
    for grad, want in zip(got, known, strict=True):
        error = (grad.double() - torch.from_numpy(want)).abs().max()
        assert error <= tolerance * max(1, np.abs(want).max())


def test_share_and_seed():
    factors = dropout_factors((2, 3, 50, 101), 0.25, 1)
    dropped = (factors == 0).mean()
    assert abs(dropped - 0.25) < 0.01
    assert set(np.unique(factors)) == {0.0, 1 / 0.75}
    assert (factors != dropout_factors((2, 3, 50, 101), 0.25, 2)).any()
    # Neighbours along no axis share their fate more often than chance has it.
    for axis in range(4):
        low, high = np.split(factors == 0, [1], axis=axis)[1], np.delete(factors == 0, -1, axis=axis)
        both = (low & high).mean()
        assert abs(both - 0.25**2) < 0.01


def test_bits_do_not_depend_on_threads():
    q, k, v, do = (x.astype(np.float32) for x in _inputs(SHAPES["prefill"]))
    options = {"dropout_p": 0.4, "dropout_seed": 3}
    before = subquad.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            subquad.set_num_threads(threads)
            out, lse = subquad.attention(q, k, v, return_lse=True, **options)
            results.append([out, *subquad.attention_backward(do, q, k, v, out, lse, **options)])
    finally:
        subquad.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


def test_no_dropout_needs_no_seed():
    q, k, v, _ = _inputs(SHAPES["odd"])
    np.testing.assert_array_equal(
        subquad.attention(q, k, v, dropout_p=0.0), subquad.attention(q, k, v, dropout_p=0.0, dropout_seed=9)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 1.0, "dropout_seed": 1}, "dropout_p: expected a number from 0 to below 1, got 1"),
        ({"dropout_p": -0.1, "dropout_seed": 1}, "dropout_p: "),
        ({"dropout_p": float("nan"), "dropout_seed": 1}, "dropout_p: "),
        ({"dropout_p": 0.5}, "dropout_seed: expected an integer, as dropout_p is above 0, got None"),
        (
            {"dropout_p": 0.5, "dropout_seed": -1},
            "dropout_seed: expected an integer from 0 to below 2\\*\\*64, got -1",
        ),
        ({"dropout_p": 0.5, "dropout_seed": 2**64}, "dropout_seed: "),
        ({"dropout_p": 0.5, "dropout_seed": 0.5}, "dropout_seed: "),
    ],
)
def test_refused(options, message):
    q, k, v, do = _inputs(SHAPES["odd"])
    with pytest.raises(ValueError, match=message):
        subquad.attention(q, k, v, **options)
    out, lse = subquad.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match=message):
        subquad.attention_backward(do, q, k, v, out, lse, **options)


def test_seeds_come_from_the_generator_of_pytorch():
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))

    def drawn(seed):
        torch.manual_seed(seed)
        leaf = q.clone().requires_grad_()
        first = subquad.attention(q, k, v, dropout_p=0.5)
        return first, *torch.autograd.grad(subquad.attention(leaf, k, v, dropout_p=0.5).sum(), leaf)

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        seed = int(torch.randint(2**63 - 1, ()))
    assert torch.equal(one[0], subquad.attention(q, k, v, dropout_p=0.5, dropout_seed=seed))
    state = torch.get_rng_state()
    subquad.attention(q, k, v, dropout_p=0.5, dropout_seed=3)
    subquad.attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state)
