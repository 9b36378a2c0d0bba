"""T5's relative bias against that of transformers' model."""

import jax
import numpy as np
import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from subquad import reference
from subquad.biases import t5_relative_bias


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (32, 20), (8, 128), (6, 7), (5, 100), (320, 800)]
)
def test_the_buckets_are_those_of_transformers(num_buckets, max_distance, bidirectional):
    table = np.arange(num_buckets)[:, None]
    found = t5_relative_bias(table, 3000, 3000, bidirectional=bidirectional, max_distance=max_distance)
    expected = T5Attention._relative_position_bucket(
        torch.arange(-2999, 3000),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    np.testing.assert_array_equal(found[0], expected.numpy())


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (3, 200), (1, 1)])
def test_the_bias_is_that_of_the_model(queries, keys, is_decoder):
    config = T5Config(d_model=8, d_kv=2, num_heads=4, is_decoder=is_decoder)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    # The model's queries are the last ones, too.
    expected = layer.compute_bias(keys, keys)[0, :, keys - queries :].detach()
    diagonals = t5_relative_bias(
        layer.relative_attention_bias.weight, queries, keys, bidirectional=not is_decoder
    )
    assert diagonals.shape == (4, queries + keys - 1)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    torch.testing.assert_close(diagonals[:, j - i + queries - 1].detach(), expected, rtol=0, atol=0)


def test_the_oracle_reads_it_alike(draw):
    table = draw("float64", 32, 2)
    q, k = draw("float64", 1, 3, 2, 4), draw("float64", 1, 40, 2, 4)
    diagonals = t5_relative_bias(table, 3, 40, bidirectional=True)
    distance = torch.arange(40) - (torch.arange(3)[:, None] + 37)
    dense = table[T5Attention._relative_position_bucket(distance).numpy()].transpose(2, 0, 1)
    np.testing.assert_array_equal(
        reference.attention(q, k, k, relative_bias=diagonals), reference.attention(q, k, k, bias=dense)
    )


def test_same_library_in_and_out():
    table = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    expected = t5_relative_bias(table, 2, 9, bidirectional=True)
    assert isinstance(expected, np.ndarray)
    assert expected.dtype == np.float32
    tensor = t5_relative_bias(torch.from_numpy(table).bfloat16(), 2, 9, bidirectional=True)
    assert tensor.dtype == torch.bfloat16
    np.testing.assert_array_equal(
        tensor.float().numpy(), torch.from_numpy(expected).bfloat16().float().numpy()
    )
    array = t5_relative_bias(jax.numpy.asarray(table), 2, 9, bidirectional=True)
    assert isinstance(array, jax.Array)
    np.testing.assert_array_equal(np.asarray(array), expected)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 3), (3, 0)])
def test_empty(queries, keys):
    table = np.ones((32, 3), np.float32)
    shape = t5_relative_bias(table, queries, keys, bidirectional=True).shape
    assert shape == (3, max(queries + keys - 1, 0))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"table": np.ones(32)}, r"table: expected shape \[num_buckets, H\], got \(32,\)"),
        ({"table": np.ones((3, 2))}, r"table: expected at least 4 buckets, got 3"),
        ({"table": np.ones((1, 2)), "bidirectional": False}, r"table: expected at least 2 buckets, got 1"),
        ({"max_distance": 8}, r"max_distance: expected more than the 8 exact buckets, got 8"),
        ({"seqlen_q": -1}, r"seqlen_q: .*-1"),
        ({"seqlen_k": -1}, r"seqlen_k: .*-1"),
    ],
)
def test_refused(changes, pattern):
    arguments = {"table": np.ones((32, 2)), "seqlen_q": 3, "seqlen_k": 3, "bidirectional": True} | changes
    with pytest.raises(ValueError, match=pattern):
        t5_relative_bias(
            arguments.pop("table"), arguments.pop("seqlen_q"), arguments.pop("seqlen_k"), **arguments
        )
