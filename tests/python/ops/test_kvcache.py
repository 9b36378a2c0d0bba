"""`attention_with_kvcache`: every form of a cache, appending, rotary embedding, pieces, hidden garbage."""

import ml_dtypes
import numpy as np
import pytest
import torch

import subquad
from subquad import reference
from subquad.testing import FLOORS, SPACING, assert_close, lse_floor, naive_attention

FORMS = ("contiguous", "head-major", "rows", "pages of 1", "pages of 7", "pages of 16", "pages of 256")
DTYPES = ("float32", "float64", "float16", "bfloat16")


@pytest.fixture(params=("numpy", "torch"))
def library(request):
    """The libraries whose memory can be written in place."""
    return request.param


def bits(array):
    """The bytes of an array in order, whatever its strides."""
    return np.ascontiguousarray(array).tobytes()


def to_numpy(array):
    """The same memory as a NumPy array."""
    if isinstance(array, torch.Tensor):
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    return array


@pytest.fixture
def call(library, convert):
    """Calls with arrays of the library sharing the memory of NumPy arrays; returns NumPy arrays."""

    def call(*arrays, **options):
        arrays = [convert(library, x) for x in arrays]
        options = {
            name: convert(library, x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }
        result = subquad.attention_with_kvcache(*arrays, return_softmax_lse=True, **options)
        assert all(type(x) is type(arrays[0]) for x in result)
        return tuple(to_numpy(x) for x in result)

    return call


def lay_out(form, logical, seed=3):
    """Puts `[B, capacity, Hkv, D]` into a cache of that form with NaN around; returns it with its options."""
    batch, capacity, heads, width = logical.shape
    if form == "contiguous":
        return logical.copy(), {}
    if form == "head-major":
        cache = np.full((batch, heads, capacity, width), np.nan, logical.dtype).swapaxes(1, 2)
        cache[...] = logical
        return cache, {}
    generator = np.random.default_rng(seed)
    if form == "rows":
        index = generator.permutation(batch + 3)[:batch].astype(np.int32)
        cache = np.full((batch + 3, capacity, heads, width), np.nan, logical.dtype)
        cache[index] = logical
        return cache, {"cache_batch_idx": index}
    size = int(form.removeprefix("pages of "))
    pages = -(-capacity // size)
    table = generator.permutation(batch * pages + 2)[: batch * pages].reshape(batch, pages)
    padded = np.full((batch, pages * size, heads, width), np.nan, logical.dtype)
    padded[:, :capacity] = logical
    cache = np.full((batch * pages + 2, size, heads, width), np.nan, logical.dtype)
    cache[table] = padded.reshape(batch, pages, size, heads, width)
    return cache, {"block_table": table.astype(np.int32)}


def gather(cache, options, shape):
    """What `lay_out` was given, out of its cache."""
    batch, capacity = shape[:2]
    if "block_table" in options:
        return cache[options["block_table"]].reshape(batch, -1, *shape[2:])[:, :capacity]
    return cache[options["cache_batch_idx"]] if "cache_batch_idx" in options else cache


def appended(logical, new, lengths):
    """A copy of `[B, capacity, Hkv, D]` with the new rows written by plain assignment."""
    logical = logical.copy()
    for b, length in enumerate(lengths):
        logical[b, length : length + new.shape[1]] = new[b]
    return logical


def check(result, q, keys, values, ranges, *, causal=False, scale=None):
    """Checks output and log-sum-exp against the oracle, sequence by sequence on the keys it may see."""
    out, lse = result
    dtype = str(q.dtype)
    parts = []
    options = {"causal": causal, "scale": scale}
    for b, (start, end) in enumerate(ranges):
        one = q[b : b + 1], keys[b : b + 1, start:end], values[b : b + 1, start:end]
        parts.append(
            (
                *reference.attention(*one, return_lse=True, **options),
                *naive_attention(*one, dtype=dtype, **options),
                *(np.max(np.abs(x.astype(np.float64)), initial=0.0) for x in one),
            )
        )
    expected, expected_lse, naive, naive_lse = (np.concatenate([p[i] for p in parts]) for i in range(4))
    largest_q, largest_k, largest_v = (max(p[i] for p in parts) for i in (4, 5, 6))
    # Few rows make what the naive formula loses a matter of luck: one rounding of the scores is allowed.
    width = q.shape[-1]
    largest_score = (width**-0.5 if scale is None else abs(scale)) * width * largest_q * largest_k
    accumulator = SPACING["float64" if dtype == "float64" else "float32"]
    floor = (FLOORS[dtype] * SPACING[dtype] + accumulator * largest_score) * largest_v
    assert out.dtype == q.dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_close(out, expected, naive=naive, dtype=dtype, floor=floor, name="out")
    floor = lse_floor(expected_lse, dtype)
    assert_close(lse, expected_lse, naive=naive_lse, dtype=dtype, floor=floor, name="lse")


def rotate(rows, cos, sin, positions, *, interleaved):
    """Rotary embedding of `[S, H, D]` at positions `[S]`, in float64, rounded once for storage."""
    wide = rows.astype(np.float64)
    c, s = (x.astype(np.float64)[positions][:, None] for x in (cos, sin))
    pairs = cos.shape[1]
    if interleaved:
        first, second = np.s_[..., 0 : 2 * pairs : 2], np.s_[..., 1 : 2 * pairs : 2]
    else:
        first, second = np.s_[..., :pairs], np.s_[..., pairs : 2 * pairs]
    out = wide.copy()
    out[first] = wide[first] * c - wide[second] * s
    out[second] = wide[first] * s + wide[second] * c
    # Half types are rounded by way of their accumulator.
    return (out if rows.dtype == np.float64 else out.astype(np.float32)).astype(rows.dtype)


def hide(logical, ranges):
    """A copy with NaN and infinities outside the ranges."""
    logical = logical.copy()
    garbage = np.resize([np.nan, np.inf, -np.inf], logical.shape[1:]).astype(logical.dtype)
    for b, (start, end) in enumerate(ranges):
        logical[b, :start], logical[b, end:] = garbage[:start], garbage[end:]
    return logical


# Empty, short, full but for the new rows; nothing, something, and all of what was there is hidden.
LENGTHS = (0, 1, 37, 90, 97)
STARTS = (0, 1, 5, 0, 64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_append_then_attend(form, causal, dtype, call, draw):
    new_tokens, capacity = 3, 100
    shape, shape_v = (5, capacity, 2, 64), (5, capacity, 2, 40)
    ranges = [(start, n + new_tokens) for start, n in zip(STARTS, LENGTHS, strict=True)]
    before = [
        hide(draw(dtype, *s), [(start, n) for start, n in zip(STARTS, LENGTHS, strict=True)])
        for s in (shape, shape_v)
    ]
    q, k, v = draw(dtype, 5, 3, 8, 64), draw(dtype, 5, new_tokens, 2, 64), draw(dtype, 5, new_tokens, 2, 40)
    after = [appended(x, new, LENGTHS) for x, new in zip(before, (k, v), strict=True)]
    caches, options = zip(*(lay_out(form, x) for x in before), strict=True)
    expected_caches, _ = zip(*(lay_out(form, x) for x in after), strict=True)
    lengths, starts = np.array(LENGTHS, np.int32), np.array(STARTS, np.int32)
    kept = [bits(x) for x in (q, k, v)]
    settings = {"cache_seqlens": lengths, "cache_leftpad": starts, "causal": causal}
    result = call(q, *caches, k, v, **settings, **options[0])
    # The new rows are written, and not a bit else, not even beside the sequences.
    for cache, expected, logical in zip(caches, expected_caches, after, strict=True):
        assert bits(cache) == bits(expected)
        assert bits(gather(cache, options[0], logical.shape)) == bits(logical)
    assert [bits(x) for x in (q, k, v)] == kept
    check(result, q, *after, ranges, causal=causal)
    # Where the keys lie does not change a bit.
    plain = [x.copy() for x in before]
    again = call(q, *plain, k, v, **settings)
    assert [bits(x) for x in again] == [bits(x) for x in result]


@pytest.mark.parametrize("form", FORMS)
def test_long_caches_of_every_form_agree_bitwise(form, dtype, call, draw):
    capacity, lengths = 700, np.array([700, 513, 0])
    keys, values = draw(dtype, 3, capacity, 1, 32), draw(dtype, 3, capacity, 1, 32)
    q = draw(dtype, 3, 2, 4, 32)
    caches, options = zip(*(lay_out(form, x) for x in (keys, values)), strict=True)
    result = call(q, *caches, cache_seqlens=lengths, causal=True, **options[0])
    plain = call(q, keys, values, cache_seqlens=lengths, causal=True)
    assert [bits(x) for x in result] == [bits(x) for x in plain]
    check(result, q, keys, values, [(0, n) for n in lengths], causal=True)


def test_a_hole_of_the_cache_keeps_its_neighbours(dtype, call, draw):
    # Every second row, head and token of a larger buffer: what lies between belongs to others.
    buffer = draw(dtype, 4, 40, 6, 24)
    cache = [buffer[::2, 1::2, ::3, 2:22], draw(dtype, 2, 20, 2, 20)]
    expected = buffer.copy()
    q, k, v = draw(dtype, 2, 1, 2, 20), draw(dtype, 2, 2, 2, 20), draw(dtype, 2, 2, 2, 20)
    expected[::2, 1::2, ::3, 2:22][:, 11:13] = k
    result = call(q, *cache, k, v, cache_seqlens=11)
    assert bits(buffer) == bits(expected)
    check(result, q, *cache, [(0, 13)] * 2)


@pytest.mark.parametrize("of_new", ["heads first", "every second", "backwards", "read-only"])
def test_new_rows_and_queries_of_every_stride(of_new, library, dtype, call, draw):
    if library == "torch" and of_new in {"backwards", "read-only"}:
        pytest.skip("PyTorch has no such tensors")
    q, k, v = draw(dtype, 2, 2, 4, 20), draw(dtype, 2, 5, 2, 20), draw(dtype, 2, 5, 2, 20)
    caches = [draw(dtype, 2, 30, 2, 20) for _ in range(2)]
    expected = [appended(c, x, [9, 25]) for c, x in zip(caches, (k, v), strict=True)]
    strided = {
        "heads first": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        "every second": lambda x: np.repeat(np.repeat(x, 2, axis=1), 2, axis=3)[:, ::2, :, ::2],
        "backwards": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        "read-only": lambda x: x,
    }[of_new]
    inputs = [strided(x) for x in (q, k, v)]
    if of_new == "read-only":
        for x in inputs:
            x.setflags(write=False)
    result = call(inputs[0], *caches, *inputs[1:], cache_seqlens=np.array([9, 25]), causal=True)
    assert [bits(x) for x in caches] == [bits(x) for x in expected]
    check(result, q, *expected, [(0, 14), (0, 30)], causal=True)


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
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 12, 32])
def test_rotary(rotary_dim, interleaved, causal, dtype, call, draw):
    lengths, starts, new_tokens, queries = (0, 7, 30), (0, 3, 30), 3, 4
    q, k, v = (draw(dtype, 3, n, h, 32) for n, h in ((queries, 4), (new_tokens, 2), (new_tokens, 2)))
    before = [hide(draw(dtype, 3, 40, 2, 32), list(zip(starts, lengths, strict=True))) for _ in range(2)]
    angles = np.random.default_rng(4).uniform(-3, 3, (40, rotary_dim // 2))
    cos, sin = np.cos(angles).astype(k.dtype), np.sin(angles).astype(k.dtype)
    new_k, new_q = k.copy(), q.copy()
    for b in range(3):
        first = lengths[b] - starts[b]
        new_k[b] = rotate(k[b], cos, sin, first + np.arange(new_tokens), interleaved=interleaved)
        positions = first + np.arange(queries) * causal
        new_q[b] = rotate(q[b], cos, sin, positions, interleaved=interleaved)
    after = [appended(x, new, lengths) for x, new in zip(before, (new_k, v), strict=True)]
    ranges = [(start, n + new_tokens) for start, n in zip(starts, lengths, strict=True)]
    kept = [bits(x) for x in (q, k, v)]
    for form in ("contiguous", "head-major", "pages of 7"):
        caches, options = zip(*(lay_out(form, x) for x in before), strict=True)
        expected, _ = zip(*(lay_out(form, x) for x in after), strict=True)
        settings = {
            "rotary_cos": cos,
            "rotary_sin": sin,
            "cache_seqlens": np.array(lengths),
            "cache_leftpad": np.array(starts),
            "rotary_interleaved": interleaved,
            "causal": causal,
        }
        result = call(q, *caches, k, v, **settings, **options[0])
        assert [bits(x) for x in caches] == [bits(x) for x in expected]
        check(result, new_q, *after, ranges, causal=causal)
    assert [bits(x) for x in (q, k, v)] == kept


def test_rotary_defaults_to_interleaved_and_rotates_queries_alone(call, draw):
    q, k, v = draw("float32", 2, 2, 2, 16), draw("float32", 2, 9, 2, 16), draw("float32", 2, 9, 2, 16)
    angles = np.random.default_rng(4).uniform(-3, 3, (11, 8))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    result = call(q, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=9, causal=True)
    turned = np.stack([rotate(x, cos, sin, np.array([9, 10]), interleaved=True) for x in q])
    check(result, turned, k, v, [(0, 9)] * 2, causal=True)


def test_rotary_of_no_pair_changes_nothing(call, draw):
    q, k, v = draw("float32", 1, 1, 2, 16), draw("float32", 1, 9, 2, 16), draw("float32", 1, 9, 2, 16)
    none = np.zeros((10, 0), np.float32)
    result = call(q, k, v, rotary_cos=none, rotary_sin=none)
    assert [bits(x) for x in result] == [bits(x) for x in call(q, k, v)]


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


@pytest.mark.parametrize("prompt", [0, 1, 20])
def test_appending_token_by_token_equals_the_prefill(prompt, dtype, call, draw):
    total = 76
    q, k, v = draw(dtype, 2, total, 4, 20), draw(dtype, 2, total, 2, 20), draw(dtype, 2, total, 2, 24)
    caches = [np.full((2, total, *x.shape[2:]), np.nan, x.dtype) for x in (k, v)]
    naive, naive_lse = naive_attention(q, k, v, dtype=dtype, causal=True)
    expected, expected_lse = reference.attention(q, k, v, causal=True, return_lse=True)
    prefill = subquad.attention(q, k, v, causal=True)
    assert_close(prefill, expected, naive=naive, dtype=dtype)
    outs, lses = [], []
    steps = [(0, prompt)] * (prompt > 0) + [(n, n + 1) for n in range(prompt, total)]
    for start, end in steps:
        part = np.s_[:, start:end]
        out, lse = call(q[part], *caches, k[part], v[part], cache_seqlens=start, causal=True)
        outs.append(out)
        lses.append(lse)
    assert [bits(x) for x in caches] == [bits(x) for x in (k, v)]
    out, lse = np.concatenate(outs, axis=1), np.concatenate(lses, axis=2)
    floor = (FLOORS[dtype] * SPACING[dtype]) * float(np.max(np.abs(expected)))
    assert_close(out, expected, naive=naive, dtype=dtype, floor=floor)
    assert_close(lse, expected_lse, naive=naive_lse, dtype=dtype, floor=lse_floor(expected_lse, dtype))
    # And row for row it is what the prefill says, as closely as two roundings allow.
    assert_close(out, prefill, naive=naive, dtype=dtype, floor=2 * floor)


def test_two_halves_merge_into_the_whole(dtype, call, draw):
    q, k, v = draw(dtype, 2, 1, 4, 32), draw(dtype, 2, 90, 2, 32), draw(dtype, 2, 90, 2, 32)
    whole = call(q, k, v)
    parts = [
        call(q, k, v, cache_seqlens=end, cache_leftpad=start) for start, end in ((0, 40), (40, 40), (40, 90))
    ]
    merged = subquad.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    check(merged, q, k, v, [(0, 90)] * 2)
    check(whole, q, k, v, [(0, 90)] * 2)


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


def test_a_shared_prefix_of_whole_pages_may_be_appended_after(call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 3, 4, 2, 16), draw("float32", 3, 4, 2, 16)
    table = np.array([[1, 0], [1, 2]], np.int32)
    new = draw("float32", 2, 2, 2, 16), draw("float32", 2, 2, 2, 16)
    before = k[1].copy()
    result = call(q, k, v, *new, block_table=table, cache_seqlens=4)
    assert bits(k[1]) == bits(before)
    assert bits(k[[0, 2], :2]) == bits(new[0])
    check(result, q, *(x[table].reshape(2, 8, 2, 16) for x in (k, v)), [(0, 6)] * 2)


def test_no_new_token_leaves_the_cache(call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 2, 9, 2, 16), draw("float32", 2, 9, 2, 16)
    nothing = np.zeros((2, 0, 2, 16), np.float32)
    before = bits(k), bits(v)
    result = call(q, k, v, nothing, nothing, cache_seqlens=9)
    assert (bits(k), bits(v)) == before
    check(result, q, k, v, [(0, 9)] * 2)


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


def test_a_cache_with_more_rows_than_sequences(call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 5, 9, 2, 16), draw("float32", 5, 9, 2, 16)
    new = draw("float32", 2, 1, 2, 16), draw("float32", 2, 1, 2, 16)
    rest = bits(k[2:])
    result = call(q, k, v, *new, cache_seqlens=np.array([8, 0]))
    assert bits(k[2:]) == rest
    check(result, q, k, v, [(0, 9), (0, 1)])


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


def test_autograd_learns_of_the_writing(draw):
    cache, values = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    token = torch.ones(1, 1, 1, 8)
    versions = cache._version, values._version
    subquad.attention_with_kvcache(token, cache, values, cache_seqlens=1)
    assert (cache._version, values._version) == versions
    subquad.attention_with_kvcache(token, cache, values, token, token, cache_seqlens=1)
    assert cache._version > versions[0]
    assert values._version > versions[1]


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


# The same kernel by other entries.


@pytest.mark.parametrize("keys", [1, 65, 300])
@pytest.mark.parametrize("of", ["nothing", "padding", "float", "both"])
def test_one_query_by_attention(of, keys, dtype, draw, check_attention):
    q, k, v = draw(dtype, 3, 1, 8, 64), draw(dtype, 3, keys, 2, 64), draw(dtype, 3, keys, 2, 64)
    clean = q, k.copy(), v.copy()
    lengths = np.array([keys, keys // 2, 0])
    visible = np.arange(keys) < lengths[:, None, None, None]
    accumulator = "float64" if dtype == "float64" else "float32"
    bias = None
    if of == "float":
        bias = draw(accumulator, 3, 8, 1, keys)
    elif of == "both":
        bias = np.where(visible, draw(accumulator, 3, 8, 1, keys), -np.inf).astype(accumulator)
    elif of == "padding":
        bias = visible
    if of in {"padding", "both"}:
        for b, n in enumerate(lengths):
            k[b, n:], v[b, n:] = np.nan, np.inf
    for causal in (False, True):
        check_attention(q, k, v, clean=clean, scores=20.0, bias=bias, causal=causal)


def test_attention_of_one_query_equals_the_cache(dtype, draw):
    q, k, v = draw(dtype, 2, 1, 8, 64), draw(dtype, 2, 700, 2, 64), draw(dtype, 2, 700, 2, 40)
    cached = subquad.attention_with_kvcache(q, k, v, return_softmax_lse=True)
    plain = subquad.attention(q, k, v, return_lse=True)
    assert [bits(x) for x in cached] == [bits(x) for x in plain]


@pytest.mark.parametrize("of", ["nothing", "padding", "float"])
def test_one_query_by_sdpa(of, dtype, draw, convert, check_sdpa):
    query, key, value = (
        convert("torch", draw(dtype, *shape)) for shape in ((2, 8, 1, 32), (2, 2, 300, 32), (2, 2, 300, 32))
    )
    mask = None
    if of == "padding":
        mask = torch.arange(300) < torch.tensor([300, 41])[:, None, None, None]
    elif of == "float":
        mask = convert("torch", draw("float64" if dtype == "float64" else "float32", 2, 1, 1, 300))
        mask = mask.to(query.dtype)
    check_sdpa(query, key, value, mask, enable_gqa=True)


def test_one_query_by_sdpa_with_garbage_in_hidden_keys(dtype, draw, convert):
    query, key, value = (
        convert("torch", draw(dtype, *shape)) for shape in ((2, 4, 1, 32), (2, 4, 300, 32), (2, 4, 300, 32))
    )
    mask = torch.arange(300) < torch.tensor([300, 41])[:, None, None, None]
    clean = subquad.scaled_dot_product_attention(query, key, value, mask)
    key[1, :, 41:], value[1, :, 41:] = torch.nan, torch.inf
    dirty = subquad.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(dirty, clean)
