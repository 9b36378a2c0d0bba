"""The calls of decoding: every layout holds the same values, and calls take turns on copies."""

import numpy as np
import pytest

import subquad
from subquad.cli.bench import decode_calls, tensors, turns, verify
from subquad.cli.bench.decode_shape import DecodeShape

pytestmark = pytest.mark.usefixtures("keep_threads")


def make_shape(**changes) -> DecodeShape:
    sizes = {"name": "a", "head_dim": 8, "dtypes": ("float32",), "heads": 4, "kv_heads": 2, "lengths": 20}
    return DecodeShape(**{**sizes, **changes})


@pytest.fixture
def caches(monkeypatch):
    """The caches that calls are given, in order, with their other arguments."""
    given = []
    attention = subquad.attention_with_kvcache

    def listen(q, k_cache, v_cache, **options):
        given.append((k_cache, v_cache, options))
        return attention(q, k_cache, v_cache, **options)

    monkeypatch.setattr(subquad, "attention_with_kvcache", listen)
    return given


@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": "bshd", "head_dim_v": 5},
        {"batch": 3, "lengths": (5, 20, 11)},
        {"queries": 4, "causal": True},
        {"batch": 2, "lengths": (3, 17), "append": True},
        {"batch": 2, "lengths": (3, 17), "append": True, "queries": 3, "causal": True},
        {"batch": 2, "lengths": (3, 17), "page_size": 4, "layout": "bshd"},
        {"batch": 2, "lengths": (4, 16), "page_size": 4, "layout": "bshd", "append": True, "queries": 2},
    ],
)
def test_results_are_those_of_all_keys(use_torch, dtype, changes):
    if use_torch:
        pytest.importorskip("torch")
    elif tensors.numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")
    shape = make_shape(dtypes=(dtype,), **changes)
    calls = decode_calls.make(shape, dtype, use_torch=use_torch)
    theirs = None if calls.theirs is None else calls.theirs()
    for _ in range(2):  # appending twice is appending once
        assert verify.check(shape, dtype, calls.inputs, calls.ours(), theirs).failure == ""


def test_layouts(caches):
    decode_calls.make(make_shape(hot=True), "float32", use_torch=False).ours()
    decode_calls.make(make_shape(hot=True, layout="bshd"), "float32", use_torch=False).ours()
    (first, _, _), (second, _, _) = caches
    assert first.shape == second.shape == (1, 20, 2, 8)
    assert first.swapaxes(1, 2).flags.c_contiguous
    assert second.flags.c_contiguous
    np.testing.assert_array_equal(first, second)


def test_pages_are_shuffled_and_what_is_unused_is_not_a_number(caches):
    shape = make_shape(batch=2, lengths=(18, 3), page_size=4, layout="bshd", hot=True)
    calls = decode_calls.make(shape, "float32", use_torch=False)
    calls.ours()
    k_cache, _, options = caches[0]
    table = options["block_table"]
    assert (k_cache.shape, table.shape, table.dtype) == ((10, 4, 2, 8), (2, 5), np.int32)
    assert sorted(table.ravel()) == list(range(10))
    assert list(table.ravel()) != list(range(10))
    for entry, length in enumerate(shape.lengths):
        rows = k_cache[table[entry]].reshape(20, 2, 8)
        np.testing.assert_array_equal(rows[:length], calls.inputs.k[entry, :length])
        assert np.isnan(rows[length:]).all()


def test_what_is_appended_is_not_there_before(caches):
    shape = make_shape(batch=2, lengths=(4, 18), append=True, queries=2, hot=True)
    calls = decode_calls.make(shape, "float32", use_torch=False)
    calls.ours()
    _, v_cache, options = caches[0]
    for entry, length in enumerate(shape.lengths):
        np.testing.assert_array_equal(options["v"][entry], calls.inputs.v[entry, length : length + 2])
        np.testing.assert_array_equal(v_cache[entry, length : length + 2], options["v"][entry])
    assert np.isnan(v_cache[0, 6:]).all()


@pytest.mark.parametrize(("hot", "copies"), [(False, 3), (True, 1)])
def test_calls_take_turns_on_enough_copies(monkeypatch, caches, hot, copies):
    shape = make_shape(hot=hot)
    size = shape.read_bytes("float32")
    monkeypatch.setattr(turns, "_WORKING_SET", 2 * size + 1)
    calls = decode_calls.make(shape, "float32", use_torch=False)
    assert sum(array.nbytes for array in calls.memory) == copies * size
    for _ in range(copies + 1):
        calls.ours()
    assert len({k_cache.ctypes.data for k_cache, _, _ in caches}) == copies
    assert caches[0][0] is caches[copies][0]


def test_copies_of_a_small_cache_are_limited():
    calls = decode_calls.make(make_shape(), "float32", use_torch=False)
    assert len(calls.memory) == 2 * turns._MAX_COPIES


@pytest.mark.parametrize(
    "changes",
    [
        {"append": True},
        {"page_size": 4, "layout": "bshd"},
        {"batch": 2, "lengths": (4, 5)},
        {"queries": 2, "causal": True},
    ],
)
def test_what_torch_cannot_do(changes):
    pytest.importorskip("torch")
    assert decode_calls.make(make_shape(**changes), "float32", use_torch=True).theirs is None


def test_torch_reads_the_same_caches(monkeypatch):
    functional = pytest.importorskip("torch").nn.functional
    seen = []
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *given, **_: seen.append(given[1]))
    calls = decode_calls.make(make_shape(), "float32", use_torch=True)
    assert calls.theirs is not None
    for _ in range(3):
        calls.theirs()
    assert all(k.is_contiguous() and k.shape == (1, 2, 20, 8) for k in seen)
    assert len({k.data_ptr() for k in seen}) == 3
