"""`attention_with_kvcache` with windows, soft-cap, ALiBi and sinks: on every form of cache, appending, with padding."""

import numpy as np
import pytest

import subquad
from subquad import reference
from subquad.testing import FLOORS, SPACING, assert_close, lse_floor, naive_attention

from .caches import lay_out

LENGTHS, STARTS = np.array([0, 1, 37, 90, 97]), np.array([0, 1, 5, 0, 64])
CAPACITY, NEW = 100, 3
SLOPES = np.array([0.5, 0.25, 0.1, 0.0, 1.0, 0.05, 0.02, 0.3], np.float32)


MODIFIERS = {
    "window": {"window_size": (9, -1)},
    "window of both sides": {"window_size": (20, 1)},
    "window of one": {"window_size": (0, 0)},
    "window of the past": {"window_size": (None, 0)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of sequences": {"alibi_slopes": np.outer(np.arange(5), SLOPES).astype(np.float32)},
    "sinks": {"sinks": np.linspace(-2, 5, 8)},
    "all": {"window_size": (33, 0), "softcap": 3.0, "alibi_slopes": SLOPES, "sinks": np.linspace(-2, 5, 8)},
}


def for_one(b, modifiers):
    """The modifiers of one sequence, as arguments of the oracle."""
    options = dict(modifiers)
    if "window_size" in options:
        options["window_size"] = tuple(
            None if side in (None, -1) else side for side in options["window_size"]
        )
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.ndim == 2:
        options["alibi_slopes"] = slopes[b]
    return options


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["contiguous", "rows", "pages of 10"])
@pytest.mark.parametrize("name", MODIFIERS)
def test_append_then_attend(name, form, causal, dtype, draw):
    modifiers = dict(MODIFIERS[name])
    if "sinks" in modifiers:
        modifiers["sinks"] = modifiers["sinks"].astype("float64" if dtype == "float64" else "float32")
    q, k, v = draw(dtype, 5, 2, 8, 32), draw(dtype, 5, NEW, 2, 32), draw(dtype, 5, NEW, 2, 20)
    before = draw(dtype, 5, CAPACITY, 2, 32), draw(dtype, 5, CAPACITY, 2, 20)
    # What is hidden whatever the window.
    for x in before:
        for b in range(5):
            x[b, : STARTS[b]], x[b, LENGTHS[b] :] = np.nan, np.nan
    (k_cache, options), (v_cache, _) = (lay_out(form, x) for x in before)
    out, lse = subquad.attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=LENGTHS,
        cache_leftpad=STARTS,
        causal=causal,
        return_softmax_lse=True,
        **options,
        **modifiers,
    )
    parts = []
    for b in range(5):
        keys, values = (
            np.concatenate([x[b, STARTS[b] : LENGTHS[b]], new[b]])[None]
            for x, new in zip(before, (k, v), strict=True)
        )
        one = for_one(b, modifiers) | {"causal": causal}
        parts.append(
            (
                *reference.attention(q[b : b + 1], keys, values, return_lse=True, **one),
                *naive_attention(q[b : b + 1], keys, values, dtype=dtype, **one),
            )
        )
    expected, expected_lse, naive, naive_lse = (np.concatenate(x) for x in zip(*parts, strict=True))
    # Few rows make what the naive formula loses a matter of luck: one rounding of the scores is allowed.
    accumulator = SPACING["float64" if dtype == "float64" else "float32"]
    floor = (FLOORS[dtype] * SPACING[dtype] + 60 * accumulator) * 4
    assert_close(out, expected, naive=naive, dtype=dtype, floor=floor, name="out")
    floor = lse_floor(expected_lse, dtype)
    assert_close(lse, expected_lse, naive=naive_lse, dtype=dtype, floor=floor, name="lse")


@pytest.mark.parametrize("num_splits", [None, 1, 3, 100])
def test_pieces_agree_with_the_oracle(num_splits, dtype, draw):
    q, k, v = draw(dtype, 1, 1, 4, 32), draw(dtype, 1, 3000, 1, 32), draw(dtype, 1, 3000, 1, 16)
    for window in (70, 1000, 2999):
        # A window that begins in the middle of a piece; nothing before it is read.
        dirty = [x.copy() for x in (k, v)]
        for x in dirty:
            x[:, : 3000 - 1 - window] = np.nan
        out = subquad.attention_with_kvcache(
            q, *dirty, window_size=(window, 0), sinks=np.ones(4, k.dtype), num_splits=num_splits
        )
        options = {"window_size": (window, 0), "sinks": np.ones(4, k.dtype)}
        naive, _ = naive_attention(q, k, v, dtype=dtype, **options)
        accumulator = SPACING["float64" if dtype == "float64" else "float32"]
        floor = (FLOORS[dtype] * SPACING[dtype] + 20 * accumulator) * 4
        expected = reference.attention(q, k, v, **options)
        assert_close(out, expected, naive=naive, dtype=dtype, floor=floor)


def test_a_window_beyond_the_length_changes_nothing(dtype, draw):
    q, k, v = draw(dtype, 2, 2, 4, 16), draw(dtype, 2, 50, 2, 16), draw(dtype, 2, 50, 2, 16)
    settings = {"cache_seqlens": np.array([50, 13]), "causal": True}
    expected = subquad.attention_with_kvcache(q, k, v, **settings)
    for window_size in ((50, 50), (2**40, -1), (-5, 0)):
        found = subquad.attention_with_kvcache(q, k, v, window_size=window_size, **settings)
        np.testing.assert_array_equal(found, expected)


def test_rows_without_keys_have_the_sink_alone(draw):
    q, k = draw("float32", 2, 3, 4, 16), draw("float32", 2, 50, 2, 16)
    sinks = np.arange(4, dtype=np.float32)
    out, lse = subquad.attention_with_kvcache(
        q, k, k, cache_seqlens=np.array([0, 2]), causal=True, sinks=sinks, return_softmax_lse=True
    )
    assert (out[0] == 0).all()
    np.testing.assert_array_equal(lse[0], np.broadcast_to(sinks[:, None], (4, 3)))
    assert (out[1, 0] == 0).all()
    np.testing.assert_array_equal(lse[1, :, 0], sinks)
