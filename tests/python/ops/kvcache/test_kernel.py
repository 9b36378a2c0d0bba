"""The kernel over the cache: sizes, pieces, hidden garbage, threads, levels."""

import ml_dtypes
import numpy as np
import pytest

import subquad
from subquad.testing import SPACING, assert_close, lse_floor

from .caches import bits, check


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (8, 2), (8, 1), (16, 2), (3, 1)], ids=str)
def test_queries_and_heads(heads, causal, dtype, call, draw):
    lengths = np.array([0, 5, 130])
    for queries in range(1, 17):
        q = draw(dtype, 3, queries, heads[0], 16)
        k, v = draw(dtype, 3, 130, heads[1], 16), draw(dtype, 3, 130, heads[1], 16)
        result = call(q, k, v, cache_seqlens=lengths, causal=causal)
        check(result, q, k, v, [(0, n) for n in lengths], causal=causal)


WIDTHS = [(8, 8), (20, 20), (64, 64), (80, 80), (128, 128), (256, 256), (512, 512)]
WIDTHS += [(64, 20), (20, 64), (1, 7), (512, 8), (8, 512), (192, 128)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths(widths, dtype, call, draw):
    width, width_v = widths
    q, k, v = draw(dtype, 2, 2, 4, width), draw(dtype, 2, 70, 2, width), draw(dtype, 2, 70, 2, width_v)
    new_k, new_v = draw(dtype, 2, 1, 2, width), draw(dtype, 2, 1, 2, width_v)
    lengths = np.array([64, 12])
    result = call(q, k, v, new_k, new_v, cache_seqlens=lengths, causal=True)
    np.testing.assert_array_equal(k[[0, 1], lengths], new_k[:, 0])
    check(result, q, k, v, [(0, n + 1) for n in lengths], causal=True)


def test_scale(dtype, call, draw):
    q, k, v = draw(dtype, 2, 1, 2, 32), draw(dtype, 2, 50, 2, 32), draw(dtype, 2, 50, 2, 32)
    for scale in (0.0, 0.05, -0.3, 1.0):
        check(call(q, k, v, softmax_scale=scale), q, k, v, [(0, 50)] * 2, scale=scale)


@pytest.mark.parametrize("causal", [False, True])
def test_pieces_agree(causal, dtype, call, draw):
    lengths, starts = np.array([1000, 0, 3, 640]), np.array([0, 0, 1, 600])
    q, k, v = draw(dtype, 4, 3, 4, 32), draw(dtype, 4, 1000, 2, 32), draw(dtype, 4, 1000, 2, 20)
    settings = {"cache_seqlens": lengths, "cache_leftpad": starts, "causal": causal}
    ranges = list(zip(starts, lengths, strict=True))
    results = {n: call(q, k, v, num_splits=n, **settings) for n in (0, None, 1, 2, 7, 100)}
    for result in results.values():
        check(result, q, k, v, ranges, causal=causal)
    default = [bits(x) for x in call(q, k, v, **settings)]
    assert [bits(x) for x in results[0]] == default
    assert [bits(x) for x in results[None]] == default
    # Half types may round the difference away, the log-sum-exp does not.
    assert [bits(x) for x in results[2]] != [bits(x) for x in results[1]]
    for many in (10**6, 2**62):
        check(call(q, k, v, num_splits=many, **settings), q, k, v, ranges, causal=causal)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_threads_do_not_change_bits(num_splits, dtype, draw, keep_num_threads):
    q, k, v = draw(dtype, 2, 2, 8, 64), draw(dtype, 2, 3000, 2, 64), draw(dtype, 2, 3000, 2, 64)
    new = draw(dtype, 2, 1, 2, 64), draw(dtype, 2, 1, 2, 64)
    results = set()
    for threads in (1, 2, 3, 5, 1, 5):
        subquad.set_num_threads(threads)
        caches = k.copy(), v.copy()
        out, lse = subquad.attention_with_kvcache(
            q,
            *caches,
            *new,
            cache_seqlens=np.array([2999, 700]),
            causal=True,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        results.add((bits(out), bits(lse), *(bits(x) for x in caches)))
    assert len(results) == 1


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_garbage_changes_no_bit(causal, garbage, dtype, call, draw):
    ranges = [(0, 65), (64, 130), (3, 3), (129, 130), (0, 0)]
    starts, lengths = np.array(ranges).T
    q, k, v = draw(dtype, 5, 2, 4, 20), draw(dtype, 5, 200, 2, 20), draw(dtype, 5, 200, 2, 20)
    settings = {"cache_seqlens": lengths, "cache_leftpad": starts, "causal": causal}
    clean = call(q, k, v, **settings)
    check(clean, q, k, v, ranges, causal=causal)
    for b, (start, end) in enumerate(ranges):
        for x in (k, v):
            x[b, :start], x[b, end:] = garbage, garbage
    for splits in (None, 3):
        dirty = call(q, k, v, num_splits=splits, **settings)
        if splits is None:
            assert [bits(x) for x in dirty] == [bits(x) for x in clean]
        assert np.isfinite(dirty[0].astype(np.float64)).all()


def test_garbage_that_later_queries_see_is_kept_from_earlier_ones(dtype, call, draw):
    q, k, v = draw(dtype, 1, 4, 2, 16), draw(dtype, 1, 80, 1, 16), draw(dtype, 1, 80, 1, 16)
    clean = call(q, k, v, causal=True)
    k[:, 78], v[:, 78] = np.nan, np.inf
    dirty = call(q, k, v, causal=True)
    assert bits(dirty[0][:, :2]) == bits(clean[0][:, :2])
    assert np.isnan(dirty[0][:, 2:].astype(np.float64)).all()


def test_a_query_that_sees_no_key_gives_zeros(dtype, call, draw):
    q, k, v = draw(dtype, 2, 3, 2, 16), draw(dtype, 2, 8, 2, 16), draw(dtype, 2, 8, 2, 16)
    out, lse = call(q, k, v, cache_seqlens=np.array([0, 5]), cache_leftpad=np.array([0, 4]), causal=True)
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()
    assert not out[1, :2].any()
    assert np.isneginf(lse[1, :, :2]).all()
    np.testing.assert_array_equal(out[1, 2], v[1, 4])


def test_two_halves_merge_into_the_whole(dtype, call, draw):
    q, k, v = draw(dtype, 2, 1, 4, 32), draw(dtype, 2, 90, 2, 32), draw(dtype, 2, 90, 2, 32)
    whole = call(q, k, v)
    parts = [
        call(q, k, v, cache_seqlens=end, cache_leftpad=start) for start, end in ((0, 40), (40, 40), (40, 90))
    ]
    merged = subquad.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    check(merged, q, k, v, [(0, 90)] * 2)
    check(whole, q, k, v, [(0, 90)] * 2)


@pytest.mark.parametrize("num_splits", [None, 1])
def test_long_sums_do_not_drift(num_splits, dtype, call):
    # Every block rescales what came before by one, exactly.
    count = 65536
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    q, k, v = np.zeros((1, 1, 1, 8), kind), np.zeros((1, count, 1, 8), kind), np.zeros((1, count, 1, 8), kind)
    v[:, : count // 2] = 1
    out, lse = call(q, k, v, num_splits=num_splits)
    np.testing.assert_allclose(out.astype(np.float64), 0.5, rtol=SPACING[dtype])
    expected = np.full((1, 1, 1), np.log(count))
    assert_close(lse, expected, naive=expected, dtype=dtype, floor=lse_floor(expected, dtype))


CHECK = """
    import hashlib
    import ml_dtypes
    import numpy as np
    import subquad
    from subquad import reference

    generator = np.random.default_rng(6)
    digest = hashlib.sha256()
    for name in ("float32", "float64", "float16", "bfloat16"):
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
        tolerance = {"float32": 1e-5, "float64": 1e-13, "float16": 4e-3, "bfloat16": 3e-2}[name]
        for queries, heads, width, width_v in ((1, 4, 64, 64), (5, 2, 20, 33), (16, 8, 128, 16)):
            drawn = lambda *shape: generator.standard_normal(shape).astype(dtype)
            q = drawn(2, queries, heads, width)
            k, v = drawn(110, 16, 2, width), drawn(110, 16, 2, width_v)
            new = drawn(2, 3, 2, width), drawn(2, 3, 2, width_v)
            table = generator.permutation(110)[:108].reshape(2, 54).astype(np.int32)
            out, lse = subquad.attention_with_kvcache(
                q, k, v, *new, cache_seqlens=np.array([861, 100]), cache_leftpad=np.array([0, 33]),
                block_table=table, causal=True, return_softmax_lse=True,
            )
            for b, (start, end) in enumerate([(0, 864), (33, 103)]):
                keys, values = (x[table[b]].reshape(1, -1, 2, x.shape[-1])[:, start:end] for x in (k, v))
                assert (keys[0, -3:] == new[0][b]).all() and (values[0, -3:] == new[1][b]).all()
                expected = reference.attention(q[b : b + 1], keys, values, causal=True)
                np.testing.assert_allclose(out[b : b + 1].astype(float), expected, rtol=0, atol=tolerance)
            digest.update(out.tobytes() + lse.tobytes() + k.tobytes() + v.tobytes())
    print(subquad._native.config()["level"], digest.hexdigest())
"""


def test_every_level(run_python, levels):
    for level in levels:
        chosen, digest = run_python(CHECK, SUBQUAD_ISA=level, SUBQUAD_NUM_THREADS="1").split()
        assert chosen == level
        assert run_python(CHECK, SUBQUAD_ISA=level, SUBQUAD_NUM_THREADS="3").split()[1] == digest
