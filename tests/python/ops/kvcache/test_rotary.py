"""Rotary embedding of new keys and of queries."""

import numpy as np
import pytest

from .caches import appended, bits, check, hide, lay_out, rotate


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
