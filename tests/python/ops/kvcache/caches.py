"""Caches of every form, what appending makes of them, and the check of a call against the oracle."""

import ml_dtypes
import numpy as np
import torch

from subquad import reference
from subquad.testing import FLOORS, SPACING, assert_close, lse_floor, naive_attention

FORMS = ("contiguous", "head-major", "rows", "pages of 1", "pages of 7", "pages of 16", "pages of 256")


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
