"""`attention_varlen`: sequences one after the other, contiguous and on pages, against the oracle and separate calls."""

import ml_dtypes
import numpy as np
import pytest
import torch

import subquad
from subquad import reference
from subquad.testing import FLOORS, SPACING, assert_close, lse_floor, naive_attention

# Queries and keys of each sequence.
LENGTHS = {
    "prefill": ([1, 64, 2, 65, 100], [1, 64, 2, 65, 100]),
    "cross": ([63, 5, 100], [2, 64, 130]),
    "decode": ([1, 1, 1, 1], [1, 63, 700, 64]),
    "a prompt among decodes": ([1, 90, 1], [300, 90, 17]),
    "empty ones": ([0, 3, 0, 2, 4, 0], [5, 7, 0, 0, 2, 0]),
    "one": ([100], [100]),
}


def cumulative(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@pytest.fixture(params=LENGTHS)
def lengths(request):
    """Lengths of queries and of keys."""
    return LENGTHS[request.param]


@pytest.fixture
def inputs(dtype, draw, lengths):
    """`q`, `k` and `v`, 4 heads, 2 of keys."""
    total_q, total_k = (sum(x) for x in lengths)
    return draw(dtype, total_q, 4, 32), draw(dtype, total_k, 2, 32), draw(dtype, total_k, 2, 20)


def naive_varlen(q, k, v, lengths, *, dtype, **options):
    """The naive formula, sequence by sequence."""
    slopes = options.pop("alibi_slopes", None)
    ends_q, ends_k = (cumulative(x) for x in lengths)
    parts = [
        naive_attention(
            q[None, ends_q[b] : ends_q[b + 1]],
            k[None, ends_k[b] : ends_k[b + 1]],
            v[None, ends_k[b] : ends_k[b + 1]],
            dtype=dtype,
            alibi_slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b],
            **options,
        )
        for b in range(len(lengths[0]))
    ]
    return np.concatenate([p[0][0] for p in parts]), np.concatenate([p[1][0] for p in parts], axis=1)


def check(result, q, k, v, lengths, **options):
    """Checks output and log-sum-exp; `options` are those of `attention_varlen`."""
    dtype = str(q.dtype)
    cu = [cumulative(x) for x in lengths]
    expected, expected_lse = reference.attention_varlen(q, k, v, *cu, **options)
    left, right = (
        None if side is None or side < 0 else side for side in options.pop("window_size", (-1, -1))
    )
    options |= {"scale": options.pop("softmax_scale", None), "softcap": options.pop("softcap", 0.0) or None}
    naive, naive_lse = naive_varlen(q, k, v, lengths, dtype=dtype, window_size=(left, right), **options)
    # Few rows make what the naive formula loses a matter of luck: one rounding of the scores is allowed.
    accumulator = SPACING["float64" if dtype == "float64" else "float32"]
    floor = (FLOORS[dtype] * SPACING[dtype] + 20 * accumulator) * float(
        np.max(np.abs(v.astype(float)), initial=0)
    )
    out, lse = result
    assert out.dtype == q.dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_close(out, expected, naive=naive, dtype=dtype, floor=floor, name="out")
    floor = lse_floor(expected_lse, dtype)
    assert_close(lse, expected_lse, naive=naive_lse, dtype=dtype, floor=floor, name="lse")


@pytest.mark.parametrize("causal", [False, True])
def test_sequences(causal, inputs, lengths):
    cu = [cumulative(x) for x in lengths]
    result = subquad.attention_varlen(*inputs, *cu, causal=causal, return_lse=True)
    check(result, *inputs, lengths, causal=causal)
    np.testing.assert_array_equal(subquad.attention_varlen(*inputs, *cu, causal=causal), result[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (9, 0), (3, 70), (None, 2), (-1, 5), (64, -1)], ids=str)
def test_windows(window_size, causal, inputs, lengths):
    cu = [cumulative(x) for x in lengths]
    options = {"window_size": window_size, "causal": causal}
    result = subquad.attention_varlen(*inputs, *cu, return_lse=True, **options)
    check(result, *inputs, lengths, **options)


@pytest.mark.parametrize("name", ["softcap", "alibi", "alibi of sequences", "sinks", "scale", "all"])
def test_modifiers(name, inputs, lengths, draw):
    dtype = str(inputs[0].dtype)
    options = {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": np.array([0.5, 0.2, 0.1, 0.0], np.float32)},
        "alibi of sequences": {"alibi_slopes": np.abs(draw("float32", len(lengths[0]), 4)) / 8},
        "sinks": {"sinks": draw("float64" if dtype == "float64" else "float32", 4)},
        "scale": {"softmax_scale": -0.3},
    }
    options["all"] = {name: x for one in options.values() for name, x in one.items()}
    options["all"] |= {"causal": True, "window_size": (40, 0)}
    cu = [cumulative(x) for x in lengths]
    result = subquad.attention_varlen(*inputs, *cu, return_lse=True, **options[name])
    check(result, *inputs, lengths, **options[name])


@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_pages(kind, page_size, inputs, lengths):
    q, k, v = inputs
    ends = cumulative(lengths[1])
    most = max(-(-n // page_size) for n in lengths[1])
    count = len(lengths[1])
    table = np.random.default_rng(5).permutation(count * most + 2)[: count * most].reshape(count, most)
    pages = [np.full((count * most + 2, page_size, *x.shape[1:]), np.nan, x.dtype) for x in (k, v)]
    for b in range(count):
        for j in range(lengths[1][b]):
            for page, x in zip(pages, (k, v), strict=True):
                page[table[b, j // page_size], j % page_size] = x[ends[b] + j]
        # Entries that are not needed are not looked at.
        table[b, -(-lengths[1][b] // page_size) :] = -1
    cu = [cumulative(x) for x in lengths]
    options = {"causal": True, "window_size": (50, -1)}
    result = subquad.attention_varlen(
        q, *pages, *cu, block_table=table.astype(kind), return_lse=True, **options
    )
    check(result, q, k, v, lengths, **options)
    expected = subquad.attention_varlen(q, k, v, *cu, return_lse=True, **options)
    for x, y in zip(result, expected, strict=True):
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=3e-2, atol=3e-2)


def test_other_sequences_do_not_leak(dtype, draw):
    lengths = [40, 3, 70], [50, 64, 70]
    q, k, v = draw(dtype, 113, 4, 16), draw(dtype, 184, 2, 16), draw(dtype, 184, 2, 8)
    cu = [cumulative(x) for x in lengths]
    expected = reference.attention_varlen(q, k, v, *cu, causal=True)[0]
    naive = naive_varlen(q, k, v, lengths, dtype=dtype, causal=True)[0]
    for b in range(3):
        dirty = [np.full_like(x, np.nan) for x in (k, v)]
        for x, y in zip(dirty, (k, v), strict=True):
            x[cu[1][b] : cu[1][b + 1]] = y[cu[1][b] : cu[1][b + 1]]
        out = expected.astype(q.dtype)
        rows = slice(cu[0][b], cu[0][b + 1])
        out[rows] = subquad.attention_varlen(q, *dirty, *cu, causal=True)[rows]
        assert_close(out, expected, naive=naive, dtype=dtype)


def test_one_batch_of_equal_lengths_is_attention(dtype, draw):
    q, k, v = draw(dtype, 3, 20, 4, 16), draw(dtype, 3, 33, 2, 16), draw(dtype, 3, 33, 2, 8)
    expected, naive = (
        reference.attention(q, k, v, causal=True),
        naive_attention(q, k, v, dtype=dtype, causal=True)[0],
    )
    cu = [np.arange(4, dtype=np.int32) * n for n in (20, 33)]
    out = subquad.attention_varlen(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)), *cu, causal=True)
    assert_close(out.reshape(expected.shape), expected, naive=naive, dtype=dtype)


def test_no_sequences(dtype, draw):
    q, k, v = draw(dtype, 0, 4, 16), draw(dtype, 0, 2, 16), draw(dtype, 0, 2, 8)
    none = np.zeros(1, np.int32)
    out, lse = subquad.attention_varlen(q, k, v, none, none, return_lse=True)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (4, 0)


def test_maxima_are_bounds(inputs, lengths):
    cu = [cumulative(x) for x in lengths]
    expected = subquad.attention_varlen(*inputs, *cu)
    for more in (0, 1, 10**6):
        maxima = [max(x) + more for x in lengths]
        np.testing.assert_array_equal(subquad.attention_varlen(*inputs, *cu, *maxima), expected)


def test_what_flash_attention_returns(inputs, lengths):
    cu = [cumulative(x) for x in lengths]
    out, lse, probabilities = subquad.attention_varlen(
        *inputs, *cu, return_attn_probs=True, deterministic=True
    )
    expected, expected_lse = subquad.attention_varlen(*inputs, *cu, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    assert probabilities is None


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries(library, dtype, draw, convert):
    q, k, v = draw(dtype, 9, 4, 16), draw(dtype, 12, 2, 16), draw(dtype, 12, 2, 8)
    cu = cumulative([4, 5]), cumulative([5, 7])
    expected = subquad.attention_varlen(q, k, v, *cu, causal=True)
    found = subquad.attention_varlen(*(convert(library, x) for x in (q, k, v, *cu)), causal=True)
    assert type(found) is type(convert(library, q))
    if isinstance(found, torch.Tensor):
        assert found.dtype == getattr(torch, dtype)
        found = (
            found.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == "bfloat16" else found.numpy()
        )
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_views_of_packed_arrays(dtype, draw):
    packed = draw(dtype, 30, 3, 2, 16)
    q, k, v = (packed[:, i] for i in range(3))
    cu = cumulative([10, 20])
    expected = subquad.attention_varlen(*(x.copy() for x in (q, k, v)), cu, cu, causal=True)
    np.testing.assert_array_equal(subquad.attention_varlen(q, k, v, cu, cu, causal=True), expected)


def test_threads_do_not_change_bits(inputs, lengths, keep_num_threads):
    cu = [cumulative(x) for x in lengths]
    results = []
    for threads in (1, 2, 5):
        subquad.set_num_threads(threads)
        results.append(
            subquad.attention_varlen(*inputs, *cu, causal=True, window_size=(30, 0), return_lse=True)
        )
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


def valid():
    """A call that is right: 3 and 2 queries, 4 and 3 keys."""
    generator = np.random.default_rng(0)
    shapes = {"q": (5, 4, 16), "k": (7, 2, 16), "v": (7, 2, 8)}
    arrays = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"cu_seqlens_q": cumulative([3, 2]), "cu_seqlens_k": cumulative([4, 3])}


def on_pages():
    """The same on pages of 2 tokens."""
    pages = np.zeros((6, 2, 2, 16), np.float32)
    table = np.array([[0, 1], [2, 3]], np.int32)
    return valid() | {"k": pages, "v": pages[..., :8].copy(), "block_table": table}


def i32(*values):
    return np.array(values, np.int32)


BAD = {
    "start": (valid, {"cu_seqlens_q": i32(1, 3, 5)}, ValueError, r"cu_seqlens_q: .*\b0\b.*\b1\b"),
    "start of keys": (valid, {"cu_seqlens_k": i32(2, 4, 7)}, ValueError, r"cu_seqlens_k: .*\b0\b.*\b2\b"),
    "negative": (valid, {"cu_seqlens_q": i32(0, -1, 5)}, ValueError, r"cu_seqlens_q: "),
    "decreasing": (valid, {"cu_seqlens_k": i32(0, 8, 7)}, ValueError, r"cu_seqlens_k: "),
    "past the end": (valid, {"cu_seqlens_q": i32(0, 3, 6)}, ValueError, r"cu_seqlens_q: .*\b5\b.*\b6\b"),
    "past the end of keys": (
        valid,
        {"cu_seqlens_k": i32(0, 4, 8)},
        ValueError,
        r"cu_seqlens_k: .*\b7\b.*\b8\b",
    ),
    "before the end": (valid, {"cu_seqlens_q": i32(0, 3, 4)}, ValueError, r"cu_seqlens_q: .*\b5\b.*\b4\b"),
    "dtype": (valid, {"cu_seqlens_q": np.array([0.0, 3, 5])}, TypeError, r"cu_seqlens_q: .*float64"),
    "boolean": (valid, {"cu_seqlens_k": np.array([0, 1, 1], bool)}, TypeError, r"cu_seqlens_k: .*bool"),
    "list": (valid, {"cu_seqlens_q": [0, 3, 5]}, TypeError, r"cu_seqlens_q: .*list"),
    "rank": (valid, {"cu_seqlens_q": i32([0, 3, 5])}, ValueError, r"cu_seqlens_q: .*\(1, 3\)"),
    "no elements": (
        valid,
        {"cu_seqlens_q": i32(), "cu_seqlens_k": i32()},
        ValueError,
        r"cu_seqlens_q: .*\(0,\)",
    ),
    "other batch": (valid, {"cu_seqlens_k": i32(0, 4, 5, 7)}, ValueError, r"cu_seqlens_k: .*\(3,\).*\(4,\)"),
    "library": (valid, {"cu_seqlens_k": torch.tensor([0, 4, 7])}, TypeError, r"cu_seqlens_k: "),
    "small maximum": (valid, {"max_seqlen_q": 2}, ValueError, r"max_seqlen_q: .*\b3\b.*\b2\b"),
    "small maximum of keys": (valid, {"max_seqlen_k": 3}, ValueError, r"max_seqlen_k: .*\b4\b.*\b3\b"),
    "negative maximum": (valid, {"max_seqlen_q": -1}, ValueError, r"max_seqlen_q: .*-1"),
    "rank of q": (valid, {"q": np.zeros((1, 5, 4, 16), np.float32)}, ValueError, r"\bq: .*\(1, 5, 4, 16\)"),
    "rank of k": (valid, {"k": np.zeros((7, 32), np.float32)}, ValueError, r"\bk: .*\(7, 32\)"),
    "width": (valid, {"k": np.zeros((7, 2, 15), np.float32)}, ValueError, r"\bk: .*\(7, 2, 15\)"),
    "heads": (
        valid,
        {"k": np.zeros((7, 3, 16), np.float32), "v": np.zeros((7, 3, 8), np.float32)},
        ValueError,
        r"\bk: .*\(7, 3, 16\)",
    ),
    "values": (valid, {"v": np.zeros((6, 2, 8), np.float32)}, ValueError, r"\bv: .*\(6, 2, 8\)"),
    "dtype of v": (valid, {"v": np.zeros((7, 2, 8))}, TypeError, r"\bv: .*float64"),
    "dropout": (valid, {"dropout_p": 0.1}, NotImplementedError, r"dropout_p: probability 0\.1"),
    "twice": (valid, {"return_lse": True, "return_attn_probs": True}, ValueError, r"return_lse: "),
    "window of one side": (valid, {"window_size": 5}, TypeError, r"window_size: .*\b5\b"),
    "window of three sides": (valid, {"window_size": (1, 2, 3)}, TypeError, r"window_size: .*\(1, 2, 3\)"),
    "window of fractions": (valid, {"window_size": (1.5, 0)}, TypeError, r"window_size: "),
    "softcap": (valid, {"softcap": -1.0}, ValueError, r"softcap: .*-1"),
    "infinite softcap": (valid, {"softcap": np.inf}, ValueError, r"softcap: .*inf"),
    "slopes": (valid, {"alibi_slopes": np.zeros(3, np.float32)}, ValueError, r"alibi_slopes: .*\(3,\)"),
    "slopes of sequences": (
        valid,
        {"alibi_slopes": np.zeros((3, 4), np.float32)},
        ValueError,
        r"alibi_slopes: .*\(3, 4\)",
    ),
    "sinks": (valid, {"sinks": np.zeros(5, np.float32)}, ValueError, r"sinks: .*\(5,\)"),
    "pages beyond": (
        on_pages,
        {"block_table": i32([0, 1], [2, 6])},
        ValueError,
        r"block_table: .*\b5\b.*\b6\b",
    ),
    "negative page": (
        on_pages,
        {"block_table": i32([0, -1], [2, 3])},
        ValueError,
        r"block_table: .*negative",
    ),
    "too few pages": (on_pages, {"block_table": i32([0], [2])}, ValueError, r"(block_table|cu_seqlens_k): "),
    "pages of other sequences": (
        on_pages,
        {"block_table": i32([0, 1])},
        ValueError,
        r"block_table: .*\(1, 2\)",
    ),
    "float pages": (on_pages, {"block_table": np.zeros((2, 2))}, TypeError, r"block_table: .*float64"),
    "keys without pages": (on_pages, {"block_table": None}, ValueError, r"\bk: .*\(6, 2, 2, 16\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    base, changes, exception, pattern = BAD[case]
    with pytest.raises(exception, match=pattern):
        subquad.attention_varlen(**base() | changes)


@pytest.mark.parametrize("base", [valid, on_pages])
def test_what_the_tables_start_from_is_accepted(base):
    assert subquad.attention_varlen(**base()).shape == (5, 4, 8)
