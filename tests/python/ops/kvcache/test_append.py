"""Every form of a cache: appending, and attending to what is in it."""

import numpy as np
import pytest
import torch

import subquad
from subquad import reference
from subquad.testing import FLOORS, SPACING, assert_close, lse_floor, naive_attention

from .caches import FORMS, appended, bits, check, gather, hide, lay_out

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


def test_a_cache_with_more_rows_than_sequences(call, draw):
    q, k, v = draw("float32", 2, 1, 2, 16), draw("float32", 5, 9, 2, 16), draw("float32", 5, 9, 2, 16)
    new = draw("float32", 2, 1, 2, 16), draw("float32", 2, 1, 2, 16)
    rest = bits(k[2:])
    result = call(q, k, v, *new, cache_seqlens=np.array([8, 0]))
    assert bits(k[2:]) == rest
    check(result, q, k, v, [(0, 9), (0, 1)])


def test_autograd_learns_of_the_writing(draw):
    cache, values = torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8)
    token = torch.ones(1, 1, 1, 8)
    versions = cache._version, values._version
    subquad.attention_with_kvcache(token, cache, values, cache_seqlens=1)
    assert (cache._version, values._version) == versions
    subquad.attention_with_kvcache(token, cache, values, token, token, cache_seqlens=1)
    assert cache._version > versions[0]
    assert values._version > versions[1]
