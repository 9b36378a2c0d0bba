"""What `attention_with_kvcache` refuses: by which exception, naming what, and leaving the cache as it was."""

import ml_dtypes
import numpy as np
import pytest
import torch

import subquad

from .caches import bits

F32 = np.float32


def normal(*shape, dtype=F32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def i32(*values):
    return np.array(values, np.int32)


def rows():
    """A call that appends two tokens to the first two of three rows."""
    return {
        "q": normal(2, 1, 4, 16),
        "k_cache": normal(3, 20, 2, 16),
        "v_cache": normal(3, 20, 2, 12),
        "k": normal(2, 2, 2, 16),
        "v": normal(2, 2, 2, 12),
        "cache_seqlens": i32(5, 7),
    }


def pages():
    """The same on pages of four tokens."""
    paged = {
        "k_cache": normal(6, 4, 2, 16),
        "v_cache": normal(6, 4, 2, 12),
        "block_table": i32([5, 0, 2], [1, 4, 3]),
    }
    return rows() | paged


def rotary(positions=20, pairs=8, dtype=F32):
    return {
        "rotary_cos": normal(positions, pairs, dtype=dtype),
        "rotary_sin": normal(positions, pairs, dtype=dtype),
    }


READ = {"k": None, "v": None}
BOTH = (rows, pages)
# What is called, what is changed about it, the exception, and a pattern of its message.
CASES = {
    # Lengths.
    "length beyond the capacity": (
        rows,
        {**READ, "cache_seqlens": i32(5, 21)},
        ValueError,
        r"cache_seqlens: .*20",
    ),
    "length with the new rows beyond": (
        rows,
        {"cache_seqlens": i32(5, 19)},
        ValueError,
        r"cache_seqlens: .*20",
    ),
    "one length beyond": (rows, {"cache_seqlens": 19}, ValueError, r"cache_seqlens: .*20"),
    "length beyond the pages": (pages, {"cache_seqlens": i32(5, 11)}, ValueError, r"cache_seqlens: .*12"),
    "negative length": (rows, {"cache_seqlens": i32(5, -1)}, ValueError, r"cache_seqlens: "),
    "one negative length": (rows, {"cache_seqlens": -1}, ValueError, r"cache_seqlens: "),
    "length of 2**63 - 1": (rows, {"cache_seqlens": 2**63 - 1}, ValueError, r"cache_seqlens: "),
    "length of 2**70": (
        rows,
        {"cache_seqlens": 2**70},
        (ValueError, TypeError, OverflowError),
        r"cache_seqlens: ",
    ),
    "no lengths": (rows, {"cache_seqlens": None}, ValueError, r"cache_seqlens: .*None"),
    "float length": (rows, {"cache_seqlens": 5.0}, TypeError, r"cache_seqlens: "),
    "float lengths": (rows, {"cache_seqlens": np.array([5.0, 7.0])}, TypeError, r"cache_seqlens: .*float64"),
    "lengths of 8 bits": (
        rows,
        {"cache_seqlens": np.array([5, 7], np.int8)},
        TypeError,
        r"cache_seqlens: .*int8",
    ),
    "boolean lengths": (
        rows,
        {"cache_seqlens": np.array([True, False])},
        TypeError,
        r"cache_seqlens: .*bool",
    ),
    "list of lengths": (rows, {"cache_seqlens": [5, 7]}, TypeError, r"cache_seqlens: .*list"),
    "too few lengths": (rows, {"cache_seqlens": i32(5)}, ValueError, r"cache_seqlens: .*\(2,\).*\(1,\)"),
    "too many lengths": (
        rows,
        {"cache_seqlens": i32(5, 7, 9)},
        ValueError,
        r"cache_seqlens: .*\(2,\).*\(3,\)",
    ),
    "matrix of lengths": (rows, {"cache_seqlens": i32([5], [7])}, ValueError, r"cache_seqlens: .*\(2, 1\)"),
    # Left padding.
    "padding beyond the length": (rows, {"cache_leftpad": i32(0, 8)}, ValueError, r"cache_leftpad: .*7.*8"),
    "one padding beyond": (rows, {"cache_leftpad": 6}, ValueError, r"cache_leftpad: .*5.*6"),
    "negative padding": (rows, {"cache_leftpad": i32(-1, 0)}, ValueError, r"cache_leftpad: "),
    "float paddings": (rows, {"cache_leftpad": np.zeros(2)}, TypeError, r"cache_leftpad: "),
    "too many paddings": (rows, {"cache_leftpad": i32(0, 0, 0)}, ValueError, r"cache_leftpad: .*\(2,\)"),
    # Rows of the cache.
    "row beyond the cache": (rows, {"cache_batch_idx": i32(0, 3)}, ValueError, r"cache_batch_idx: .*2.*3"),
    "negative row": (rows, {"cache_batch_idx": i32(0, -1)}, ValueError, r"cache_batch_idx: "),
    "row twice": (rows, {"cache_batch_idx": i32(2, 2)}, ValueError, r"cache_batch_idx: .*2"),
    "float rows": (rows, {"cache_batch_idx": np.zeros(2)}, TypeError, r"cache_batch_idx: "),
    "too few rows chosen": (rows, {"cache_batch_idx": i32(0)}, ValueError, r"cache_batch_idx: .*\(2,\)"),
    "fewer rows than sequences": (
        rows,
        {"k_cache": normal(1, 20, 2, 16), "v_cache": normal(1, 20, 2, 12)},
        ValueError,
        r"k_cache: .*2 rows",
    ),
    # Pages.
    "page beyond the cache": (
        pages,
        {"block_table": i32([5, 0, 2], [1, 6, 3])},
        ValueError,
        r"block_table: .*5.*6",
    ),
    "negative page": (pages, {"block_table": i32([5, -1, 2], [1, 4, 3])}, ValueError, r"block_table: "),
    "page of two sequences": (
        pages,
        {"block_table": i32([5, 0, 2], [1, 0, 3])},
        ValueError,
        r"block_table: .*0",
    ),
    "page that another reads": (
        pages,
        {"block_table": i32([5, 0, 2], [0, 4, 3]), "cache_seqlens": i32(5, 7)},
        ValueError,
        r"block_table: .*0",
    ),
    "page twice in a sequence": (
        pages,
        {"block_table": i32([5, 5, 2], [1, 4, 3])},
        ValueError,
        r"block_table: .*5",
    ),
    "float pages": (pages, {"block_table": np.zeros((2, 3))}, TypeError, r"block_table: .*float64"),
    "one row of pages": (pages, {"block_table": i32(5, 0, 2)}, ValueError, r"block_table: .*\(3,\)"),
    "pages of three sequences": (
        pages,
        {"block_table": i32([0], [1], [2])},
        ValueError,
        r"block_table: .*\(3, 1\)",
    ),
    "pages and rows": (pages, {"cache_batch_idx": i32(0, 1)}, ValueError, r"cache_batch_idx: .*block_table"),
    "empty pages": (
        pages,
        {"k_cache": normal(6, 0, 2, 16), "v_cache": normal(6, 0, 2, 12)},
        ValueError,
        r"k_cache: ",
    ),
    # Pairs.
    "k alone": (rows, {"v": None}, ValueError, r"\bv: .*\bk\b"),
    "v alone": (rows, {"k": None}, ValueError, r"\bk: .*\bv\b"),
    "cosines alone": (rows, {"rotary_cos": normal(20, 8)}, ValueError, r"rotary_sin: .*rotary_cos"),
    "sines alone": (rows, {"rotary_sin": normal(20, 8)}, ValueError, r"rotary_cos: .*rotary_sin"),
    # Rotary embedding: the longest sequence appends at positions 7 and 8.
    "too few angles": (rows, rotary(positions=8), ValueError, r"rotary_cos: .*9"),
    "too few angles for queries": (
        rows,
        {**rotary(positions=10), "q": normal(2, 4, 4, 16), "causal": True},
        ValueError,
        r"rotary_cos: .*11",
    ),
    "more pairs than width": (rows, rotary(pairs=9), ValueError, r"rotary_cos: .*8"),
    "sines of another shape": (rows, {**rotary(), "rotary_sin": normal(20, 7)}, ValueError, r"rotary_sin: "),
    "sines too short": (rows, {**rotary(), "rotary_sin": normal(19, 8)}, ValueError, r"rotary_sin: "),
    "angles of rank 1": (rows, {**rotary(), "rotary_cos": normal(20)}, ValueError, r"rotary_cos: "),
    "strided angles": (rows, {**rotary(), "rotary_cos": normal(20, 16)[:, :8]}, ValueError, r"rotary_cos: "),
    "angles of another dtype": (rows, rotary(dtype=np.float64), TypeError, r"rotary_cos: .*float64"),
    # Dtypes and libraries.
    "integer queries": (rows, {"q": np.ones((2, 1, 4, 16), np.int32)}, TypeError, r"\bq: .*int32"),
    "queries of another dtype": (rows, {"q": normal(2, 1, 4, 16, dtype=np.float16)}, TypeError, r"k_cache: "),
    "keys of another dtype": (
        rows,
        {"k_cache": normal(3, 20, 2, 16, dtype=np.float64)},
        TypeError,
        r"k_cache: ",
    ),
    "values of another dtype": (
        rows,
        {"v_cache": normal(3, 20, 2, 12, dtype=np.float64)},
        TypeError,
        r"v_cache: ",
    ),
    "new keys of another dtype": (rows, {"k": normal(2, 2, 2, 16, dtype=np.float16)}, TypeError, r"\bk: "),
    "new values of another dtype": (
        rows,
        {"v": normal(2, 2, 2, 12).astype(ml_dtypes.bfloat16)},
        TypeError,
        r"\bv: .*bfloat16",
    ),
    "keys of another library": (rows, {"k_cache": torch.zeros(3, 20, 2, 16)}, TypeError, r"k_cache: "),
    "new values of another library": (rows, {"v": torch.zeros(2, 2, 2, 12)}, TypeError, r"\bv: "),
    "queries that are no array": (rows, {"q": [[1.0]]}, TypeError, r"\bq: .*list"),
    "no cache": (rows, {"v_cache": None}, TypeError, r"v_cache: "),
    # Shapes.
    "queries of rank 3": (rows, {"q": normal(2, 4, 16)}, ValueError, r"\bq: .*\(2, 4, 16\)"),
    "keys of rank 3": (rows, {"k_cache": normal(3, 40, 16)}, ValueError, r"k_cache: .*\(3, 40, 16\)"),
    "values of rank 5": (rows, {"v_cache": normal(3, 20, 2, 12, 1)}, ValueError, r"v_cache: "),
    "keys of another width": (rows, {"k_cache": normal(3, 20, 2, 20)}, ValueError, r"k_cache: .*20"),
    "values of another capacity": (rows, {"v_cache": normal(3, 19, 2, 12)}, ValueError, r"v_cache: .*19"),
    "values of other rows": (rows, {"v_cache": normal(4, 20, 2, 12)}, ValueError, r"v_cache: .*4"),
    "values of other heads": (rows, {"v_cache": normal(3, 20, 1, 12)}, ValueError, r"v_cache: "),
    "heads that do not divide": (rows, {"q": normal(2, 1, 3, 16)}, ValueError, r"(q|k_cache): "),
    "too wide": (
        rows,
        {"q": normal(2, 1, 4, 1025), "k_cache": normal(3, 20, 2, 1025), "k": normal(2, 2, 2, 1025)},
        (ValueError, NotImplementedError),
        r"1025",
    ),
    "new keys of rank 3": (rows, {"k": normal(2, 2, 16)}, ValueError, r"\bk: "),
    "new values of rank 3": (rows, {"v": normal(2, 2, 12)}, ValueError, r"\bv: "),
    "new keys of other sequences": (rows, {"k": normal(3, 2, 2, 16)}, ValueError, r"\bk: .*\(3, 2, 2, 16\)"),
    "new keys of other heads": (rows, {"k": normal(2, 2, 4, 16)}, ValueError, r"\bk: .*\(2, 2, 4, 16\)"),
    "new keys of another width": (rows, {"k": normal(2, 2, 2, 8)}, ValueError, r"\bk: .*\(2, 2, 2, 8\)"),
    "new values of another length": (rows, {"v": normal(2, 1, 2, 12)}, ValueError, r"\bv: .*\(2, 1, 2, 12\)"),
    "new values of another width": (rows, {"v": normal(2, 2, 2, 16)}, ValueError, r"\bv: .*\(2, 2, 2, 16\)"),
    "keys of strided width": (
        rows,
        {"k_cache": np.asfortranarray(normal(3, 20, 2, 16))},
        ValueError,
        r"k_cache: .*contiguous",
    ),
    # Options.
    "window of one side": (rows, {"window_size": 5}, TypeError, r"window_size: expected .* got 5$"),
    "window of three sides": (
        rows,
        {"window_size": (1, 2, 3)},
        TypeError,
        r"window_size: .* got \(1, 2, 3\)$",
    ),
    "window of fractions": (rows, {"window_size": (1.5, 0)}, TypeError, r"window_size: "),
    "negative soft-cap": (rows, {"softcap": -30.0}, ValueError, r"softcap: .*-30"),
    "infinite soft-cap": (rows, {"softcap": np.inf}, ValueError, r"softcap: .*inf"),
    "slopes of other heads": (rows, {"alibi_slopes": normal(3)}, ValueError, r"alibi_slopes: .*\(3,\)"),
    "slopes of other sequences": (
        rows,
        {"alibi_slopes": normal(3, 4)},
        ValueError,
        r"alibi_slopes: .*\(3, 4\)",
    ),
    "slopes of another dtype": (
        rows,
        {"alibi_slopes": normal(4, dtype=np.float64)},
        TypeError,
        r"alibi_slopes: .*float64",
    ),
    "slopes that are no array": (rows, {"alibi_slopes": [0.5] * 4}, TypeError, r"alibi_slopes: .*list"),
    "sinks of other heads": (rows, {"sinks": normal(2)}, ValueError, r"sinks: .*\(2,\)"),
    "sinks of another dtype": (rows, {"sinks": normal(4, dtype=np.float16)}, TypeError, r"sinks: .*float16"),
    "sinks of another library": (rows, {"sinks": torch.zeros(4)}, TypeError, r"sinks: "),
    "negative pieces": (rows, {"num_splits": -1}, ValueError, r"num_splits: .*-1"),
}


def snapshot(caches):
    return [bits(x) for x in caches if isinstance(x, np.ndarray)]


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    base, changes, exception, pattern = CASES[case]
    arguments = base() | changes
    caches = [x for x in (arguments["k_cache"], arguments["v_cache"]) if x is not None]
    caches = [x.numpy() if isinstance(x, torch.Tensor) else x for x in caches]
    before = snapshot(caches)
    with pytest.raises(exception, match=pattern):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot(caches) == before


@pytest.mark.parametrize("base", BOTH)
def test_what_the_table_starts_from_is_accepted(base):
    arguments = base()
    before = snapshot([arguments["k_cache"]])
    assert subquad.attention_with_kvcache(**arguments, **rotary(positions=9)).shape == (2, 1, 4, 12)
    assert snapshot([arguments["k_cache"]]) != before
    subquad.attention_with_kvcache(**base() | {"cache_seqlens": i32(10, 10)})
    subquad.attention_with_kvcache(**base() | READ)


@pytest.mark.parametrize("lengths", [[5], [True]], ids=str)
def test_one_element_is_not_one_for_all(lengths):
    # Tensors of one element pass for integers.
    arguments = {name: torch.from_numpy(x) for name, x in rows().items()}
    arguments["cache_seqlens"] = torch.tensor(lengths)
    before = snapshot([arguments["k_cache"].numpy()])
    with pytest.raises((ValueError, TypeError), match="cache_seqlens: "):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([arguments["k_cache"].numpy()]) == before


def test_one_element_has_the_dtype_checked():
    arguments = {name: torch.from_numpy(x[:1]) for name, x in rows().items()}
    for kind in (torch.int8, torch.bool, torch.float32):
        arguments["cache_seqlens"] = torch.ones(1, dtype=kind)
        with pytest.raises(TypeError, match="cache_seqlens: "):
            subquad.attention_with_kvcache(**arguments)


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
def test_a_read_only_cache_is_read_and_not_appended_to(which):
    arguments = rows()
    arguments[which].setflags(write=False)
    caches = arguments["k_cache"], arguments["v_cache"]
    before = snapshot(caches)
    with pytest.raises(ValueError, match=f"{which}: .*(writ|read-only)"):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot(caches) == before
    subquad.attention_with_kvcache(**arguments | READ)


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
def test_a_cache_that_repeats_its_memory(which):
    arguments = rows()
    one = arguments[which][:1]
    arguments[which] = np.lib.stride_tricks.as_strided(one, (3, *one.shape[1:]), (0, *one.strides[1:]))
    before = snapshot([one])
    with pytest.raises(ValueError, match=f"{which}: "):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([one]) == before
    subquad.attention_with_kvcache(**arguments | READ)


@pytest.mark.parametrize("other", ["q", "k", "v"])
def test_inputs_out_of_the_cache(other):
    arguments = rows()
    cache = arguments["v_cache" if other == "v" else "k_cache"]
    inside = cache[:2, :2]
    if other == "q":
        inside = np.lib.stride_tricks.as_strided(inside, (2, 1, 4, 16), (*inside.strides[:2], 64, 4))
    arguments[other] = inside
    caches = arguments["k_cache"], arguments["v_cache"]
    before = snapshot(caches)
    with pytest.raises(ValueError, match=f"[kv]_cache: .*overlaps {other}"):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot(caches) == before


def test_one_cache_for_keys_and_values():
    # The values would overwrite the keys.
    arguments = rows() | {"v": normal(2, 2, 2, 16)}
    arguments["v_cache"] = arguments["k_cache"]
    before = snapshot([arguments["k_cache"]])
    with pytest.raises(ValueError, match=r"[kv]_cache: "):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([arguments["k_cache"]]) == before
    subquad.attention_with_kvcache(**arguments | READ)


def test_keys_and_values_side_by_side_in_one_buffer():
    buffer = normal(3, 20, 2, 2, 16)
    arguments = rows() | {"v": normal(2, 2, 2, 16), "k_cache": buffer[:, :, 0], "v_cache": buffer[:, :, 1]}
    apart = {name: arguments[name].copy() for name in ("k_cache", "v_cache")}
    expected = subquad.attention_with_kvcache(**arguments | apart)
    np.testing.assert_array_equal(subquad.attention_with_kvcache(**arguments), expected)
    np.testing.assert_array_equal(buffer, np.stack(list(apart.values()), axis=2))


@pytest.mark.parametrize("of", ["backwards", "misaligned", "backwards and read-only"])
def test_a_cache_that_would_have_to_be_copied_is_not_silently_lost(of):
    arguments = rows()
    cache = arguments["k_cache"]
    if of == "misaligned":
        raw = np.zeros(cache.nbytes + 1, np.uint8)
        view = raw[1:].view(F32).reshape(cache.shape)
        view[...] = cache
    else:
        view = cache.copy()[:, ::-1]
        view.setflags(write=of == "backwards")
    before = snapshot([view, arguments["v_cache"]])
    with pytest.raises(ValueError, match="k_cache: "):
        subquad.attention_with_kvcache(**arguments | {"k_cache": view})
    assert snapshot([view, arguments["v_cache"]]) == before


def test_arrays_that_never_change_are_not_appended_to():
    jax = pytest.importorskip("jax")
    arguments = {name: jax.numpy.asarray(x) for name, x in rows().items()}
    before = snapshot([np.asarray(arguments["k_cache"])])
    with pytest.raises(ValueError, match="k_cache: "):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([np.asarray(arguments["k_cache"])]) == before
    subquad.attention_with_kvcache(**arguments | READ)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"])
def test_gradients_are_refused(name):
    arguments = {name: torch.from_numpy(x) for name, x in (rows() | rotary()).items()}
    arguments[name].requires_grad_()
    before = snapshot([arguments["k_cache"].detach().numpy()])
    with pytest.raises(NotImplementedError, match=f"{name}: .*grad"):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([arguments["k_cache"].detach().numpy()]) == before
    with torch.no_grad():
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([arguments["k_cache"].detach().numpy()]) != before


def test_a_tensor_on_another_device():
    arguments = {name: torch.from_numpy(x) for name, x in rows().items()}
    arguments["v_cache"] = torch.empty(3, 20, 2, 12, device="meta")
    before = snapshot([arguments["k_cache"].numpy()])
    with pytest.raises(ValueError, match=r"v_cache: .*meta"):
        subquad.attention_with_kvcache(**arguments)
    assert snapshot([arguments["k_cache"].numpy()]) == before
