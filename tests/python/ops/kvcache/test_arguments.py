"""Lengths, tables and options of every form, and calls with nothing to do."""

import ml_dtypes
import numpy as np
import pytest

import subquad

from .caches import bits, check


@pytest.mark.parametrize(
    "integers", ["int32", "int64", "strided", "python", "numpy scalar", "zero-dimensional"]
)
def test_lengths_of_every_form(integers, call, draw):
    q, k, v = draw("float32", 3, 1, 2, 16), draw("float32", 3, 20, 2, 16), draw("float32", 3, 20, 2, 16)
    lengths = {
        "int32": np.array([12, 12, 12], np.int32),
        "int64": np.array([12, 12, 12], np.int64),
        "strided": np.array([12, 99, 12, -1, 12, 7], np.int64)[::2],
        "python": 12,
        "numpy scalar": np.int32(12),
        "zero-dimensional": np.array(12),
    }[integers]
    start = np.array([2, 2, 2]) if integers != "python" else 2
    result = call(q, k, v, cache_seqlens=lengths, cache_leftpad=start)
    check(result, q, k, v, [(2, 12)] * 3)


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_tables_of_every_form(kind, call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 8, 4, 2, 16), draw("float32", 8, 4, 2, 16)
    wide = np.array([[3, 9, 0, 9], [5, 9, 7, 9]], kind)
    table = wide[:, ::2]
    result = call(q, k, v, block_table=table)
    check(result, q, *(x[table].reshape(2, 8, 2, 16) for x in (k, v)), [(0, 8)] * 2)
    column_major = np.asfortranarray(table)
    assert bits(call(q, k, v, block_table=column_major)[0]) == bits(result[0])


def test_unused_entries_of_a_table_are_not_looked_at(call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 4, 4, 2, 16), draw("float32", 4, 4, 2, 16)
    table = np.array([[1, -1, 99], [2, 3, -1]], np.int32)
    result = call(q, k, v, block_table=table, cache_seqlens=np.array([4, 5]))
    used = np.array([[1, 0], [2, 3]])
    check(result, q, *(x[used].reshape(2, 8, 2, 16) for x in (k, v)), [(0, 4), (0, 5)])


@pytest.mark.parametrize("arg", ["cache_batch_idx", "block_table"])
def test_sequences_that_only_read_may_share(arg, call, draw):
    q, k, v = draw("float32", 3, 1, 2, 16), draw("float32", 2, 9, 2, 16), draw("float32", 2, 9, 2, 16)
    index = np.array([1, 1, 0], np.int32)
    result = call(q, k, v, **{arg: index if arg == "cache_batch_idx" else index[:, None]})
    check(result, q, k[index], v[index], [(0, 9)] * 3)


@pytest.mark.parametrize("sizes", [(0, 1, 2, 9), (2, 0, 2, 9), (2, 1, 0, 9), (2, 3, 2, 0)], ids=str)
def test_nothing_to_do(sizes, dtype, call):
    batch, queries, heads, capacity = sizes
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, cache = np.zeros((batch, queries, heads, 16), kind), np.ones((batch, capacity, heads, 16), kind)
    for causal in (False, True):
        out, lse = call(q, cache, cache.copy(), cache_seqlens=capacity, causal=causal)
        assert out.shape == q.shape
        assert lse.shape == (batch, heads, queries)
        assert capacity == 0 or out.size == 0
        assert not out.any()
        assert np.isneginf(lse).all()


def test_an_empty_batch_takes_every_argument(call, draw):
    cache = draw("float32", 3, 16, 2, 8)
    empty = np.zeros((0,), np.int32)
    new = np.zeros((0, 1, 2, 8), np.float32)
    before = bits(cache)
    for options in ({"cache_batch_idx": empty}, {"block_table": np.zeros((0, 4), np.int64)}):
        out, lse = call(
            np.zeros((0, 1, 4, 8), np.float32),
            cache,
            cache.copy(),
            new,
            new,
            cache_seqlens=empty,
            cache_leftpad=empty,
            **options,
        )
        assert out.shape == (0, 1, 4, 8)
        assert lse.shape == (0, 4, 1)
    assert bits(cache) == before


def test_flash_attention_spells_off_in_its_own_way(call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 2, 9, 2, 16), draw("float32", 2, 9, 2, 16)
    expected = call(q, k, v)
    for window in ((-1, -1), (None, -1), (None, None)):
        result = call(q, k, v, window_size=window, softcap=0.0, num_splits=0, alibi_slopes=None)
        assert [bits(x) for x in result] == [bits(x) for x in expected]


def test_positional_order_is_flash_attentions(draw):
    q, k, v = draw("float32", 2, 2, 2, 16), draw("float32", 5, 9, 2, 16), draw("float32", 5, 9, 2, 16)
    index, lengths, pad = np.array([4, 1]), np.array([7, 8]), np.array([1, 0])
    result = subquad.attention_with_kvcache(
        *(q, k, v, None, None, None, None, lengths, index, pad, None, 0.3, True),
        *((-1, -1), 0.0, True, None, 0, True),
    )
    check(result, q, k[index], v[index], [(1, 7), (0, 8)], causal=True, scale=0.3)
    alone = subquad.attention_with_kvcache(q, k[:2], v[:2])
    assert isinstance(alone, np.ndarray)


@pytest.mark.parametrize("library", ["jax", "dlpack"])
def test_arrays_of_other_libraries_are_read(library, dtype, convert, draw):
    q, k, v = draw(dtype, 2, 1, 4, 16), draw(dtype, 2, 20, 2, 16), draw(dtype, 2, 20, 2, 16)
    lengths, pad = np.array([20, 7], np.int32), np.array([3, 0], np.int32)
    settings = {"cache_seqlens": lengths, "cache_leftpad": pad}
    converted = {name: convert(library, x) for name, x in settings.items()}
    out = subquad.attention_with_kvcache(*(convert(library, x) for x in (q, k, v)), **converted)
    expected = subquad.attention_with_kvcache(q, k, v, **settings)
    if library == "jax":
        assert type(out) is type(convert("jax", q))
    assert bits(np.asarray(out)) == bits(expected)
