"""Results that are too large for the caches are written past them, and are the same."""

import numpy as np
import pytest
import torch

import subquad
from subquad import ops

# What each call of one row of the batch gives is below the size from which results pass the caches, that of all rows above it.
BATCH, BYTES = 5, 2 << 20


def draw(dtype, *shape, seed=0):
    numbers = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
    return numbers.to(dtype)


def tokens_of(dtype, width):
    return BYTES // dtype.itemsize // width


def convolution(dtype, *, channels_last):
    channels = 512
    x = draw(dtype, BATCH, channels, tokens_of(dtype, channels))
    if channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = draw(dtype, channels, 4, seed=1), draw(dtype, channels, seed=2)
    return (x,), lambda x: ops.causal_conv1d_fn(x, weight, bias, activation="silu")


def recurrent(dtype, function, **options):
    heads, width = 4, 64
    tokens = tokens_of(dtype, heads * width)
    q, k, v = (draw(dtype, BATCH, tokens, heads, width, seed=seed) / 8 for seed in range(3))
    gates = [draw(dtype, BATCH, tokens, heads, seed=seed) for seed in (3, 4)]
    gates = [-gates[0].abs() / 4, gates[1].sigmoid()][: 2 if function is ops.chunk_gated_delta_rule else 1]
    return (q, k, v, *gates), lambda *arrays: function(*arrays, **options)[0]


def attention(dtype):
    heads, width = 32, 64
    arrays = [
        draw(dtype, BATCH, tokens_of(dtype, heads * width), heads, width, seed=seed) for seed in range(3)
    ]
    return arrays, lambda q, k, v: subquad.attention(q, k, v, causal=True)


CALLS = {
    "convolution, tokens contiguous": lambda dtype: convolution(dtype, channels_last=False),
    "convolution, channels contiguous": lambda dtype: convolution(dtype, channels_last=True),
    "simple GLA": lambda dtype: recurrent(dtype, ops.chunk_simple_gla),
    "gated delta rule": lambda dtype: recurrent(dtype, ops.chunk_gated_delta_rule),
    "gated delta rule, lengths 1": lambda dtype: recurrent(
        dtype, ops.chunk_gated_delta_rule, use_qk_l2norm_in_kernel=True
    ),
    "attention": attention,
}


def with_gradients(function, arrays):
    leaves = [array.detach().requires_grad_() for array in arrays]
    out = function(*leaves)
    torch.autograd.backward(out, draw(out.dtype, *out.shape[1:], seed=9).expand(out.shape))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_rows_of_the_batch_are_those_of_small_calls(call, dtype):
    arrays, function = CALLS[call](dtype)
    whole = with_gradients(function, arrays)
    for row in range(BATCH):
        alone = with_gradients(function, [array[row : row + 1] for array in arrays])
        for found, expected in zip(whole, alone, strict=True):
            assert torch.equal(found[row : row + 1], expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads(threads, keep_num_threads):
    arrays, function = CALLS["gated delta rule"](torch.float32)
    expected = with_gradients(function, arrays)
    subquad.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(with_gradients(function, arrays), expected, strict=True))


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_memory_that_is_new_to_the_process(library):
    """Of 32 MiB and more, in no whole number of pages."""
    channels, tokens = 1023, 8219
    x, weight = draw(torch.float32, 1, channels, tokens), draw(torch.float32, channels, 4, seed=1)
    if library == "numpy":
        x, weight = x.numpy(), weight.numpy()
    whole = ops.causal_conv1d_fn(x, weight)
    assert whole.nbytes >= 32 << 20
    for part in (slice(0, 500), slice(500, None)):
        alone = ops.causal_conv1d_fn(x[:, part], weight[part])
        np.testing.assert_array_equal(np.asarray(whole[:, part]), np.asarray(alone))
