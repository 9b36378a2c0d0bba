"""Mask objects: their matrices against their definitions, element by element; what they refuse; how they are lowered."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import masks
from subquad.masks import (
    Mask,
    block_causal,
    causal,
    chunked,
    document,
    padding,
    prefix,
    sliding_window,
)

SHAPES = [(1, 1, 1), (2, 5, 5), (2, 3, 9), (2, 9, 3), (1, 4, 0), (1, 0, 4), (2, 1, 12), (0, 3, 3)]


def matrix(shape, rule):
    """The matrix `[B, Sq, Sk]` of a rule on sequence, index and position of the query, and key."""
    _, queries, keys = shape
    out = np.zeros(shape, bool)
    for b, i, j in np.ndindex(shape):
        out[b, i, j] = rule(b, i, i + keys - queries, j)
    return out


# A mask, and its rule, for each shape.
RULES = {
    "causal": lambda shape: (causal(), lambda b, i, p, j: j <= p),
    "window": lambda shape: (sliding_window(2), lambda b, i, p, j: p - 2 <= j <= p),
    "window of itself": lambda shape: (sliding_window(0), lambda b, i, p, j: j == p),
    "window of both sides": lambda shape: (sliding_window(1, 2), lambda b, i, p, j: p - 1 <= j <= p + 2),
    "window to the right": lambda shape: (sliding_window(None, 1), lambda b, i, p, j: j <= p + 1),
    "window to the left": lambda shape: (sliding_window(3, None), lambda b, i, p, j: p - 3 <= j),
    "window of everything": lambda shape: (sliding_window(None, None), lambda b, i, p, j: True),
    # Chunks by multiplication: no quotient of a negative number.
    "chunked": lambda shape: (
        chunked(4),
        lambda b, i, p, j: any(4 * c <= p < 4 * c + 4 and 4 * c <= j < 4 * c + 4 for c in range(-9, 9)),
    ),
    "chunks of one": lambda shape: (chunked(1), lambda b, i, p, j: p == j),
    "block causal": lambda shape: (
        block_causal(3),
        lambda b, i, p, j: any(p >= 3 * c and 3 * c <= j < 3 * c + 3 for c in range(9)),
    ),
    "prefix": lambda shape: (prefix(2), lambda b, i, p, j: j < 2),
    "empty prefix": lambda shape: (prefix(0), lambda b, i, p, j: False),
    "prefixes": lambda shape: (prefix(np.arange(shape[0]) * 3), lambda b, i, p, j: j < 3 * b),
    "padding": lambda shape: (padding(4), lambda b, i, p, j: j < 4),
    "paddings": lambda shape: (
        padding(np.arange(shape[0]) + 3, np.arange(shape[0])),
        lambda b, i, p, j: b <= j < b + 3,
    ),
    "one end and starts": lambda shape: (
        padding(4, np.arange(shape[0])),
        lambda b, i, p, j: b <= j < 4,
    ),
    "padding of queries": lambda shape: (
        padding(np.arange(shape[0]) + 3, 1, queries=True),
        lambda b, i, p, j: 1 <= j < b + 3 and 1 <= p < b + 3,
    ),
    "document": lambda shape: (
        document(np.arange(shape[1]) // 2, np.arange(shape[2]) // 2),
        lambda b, i, p, j: i // 2 == j // 2,
    ),
    "documents": lambda shape: (
        document(np.arange(shape[1]) % 3, np.add.outer(np.arange(shape[0]), np.arange(shape[2])) % 3),
        lambda b, i, p, j: i % 3 == (j + b) % 3,
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_dense_is_the_definition(name, shape):
    mask, rule = RULES[name](shape)
    dense = mask.dense(*shape)
    assert dense.dtype == bool
    np.testing.assert_array_equal(dense, matrix(shape, rule))


def test_documents_of_their_own_keys():
    ids = [[7, 7, -1, 7], [0, 1, 1, 2]]
    expected = np.array([[[a == b for b in row] for a in row] for row in ids])
    np.testing.assert_array_equal(document(ids).dense(2, 4, 4), expected)
    np.testing.assert_array_equal(document(ids[0]).dense(2, 4, 4), expected[[0, 0]])


def test_joined_masks():
    ids = np.array([0, 0, 1, 1, 1])
    joined = {
        "chunked causal": (chunked(2) & causal(), lambda b, i, p, j: p // 2 == j // 2 and j <= p),
        "prefix language model": (prefix(3) | causal(), lambda b, i, p, j: j < 3 or j <= p),
        "packed": (document(ids) & causal(), lambda b, i, p, j: ids[p] == ids[j] and j <= p),
        "or of ands": (
            (prefix(1) & causal()) | sliding_window(1),
            lambda b, i, p, j: (j < 1 and j <= p) or p - 1 <= j <= p,
        ),
        "and of ors": (
            (prefix(1) | sliding_window(1)) & padding(4) & block_causal(2),
            lambda b, i, p, j: (j < 1 or p - 1 <= j <= p) and j < 4 and j // 2 <= p // 2,
        ),
    }
    for name, (mask, rule) in joined.items():
        np.testing.assert_array_equal(mask.dense(2, 5, 5), matrix((2, 5, 5), rule), err_msg=name)


simple = st.one_of(
    st.builds(causal),
    st.builds(sliding_window, st.none() | st.integers(0, 5), st.none() | st.integers(0, 5)),
    st.builds(chunked, st.integers(1, 6)),
    st.builds(block_causal, st.integers(1, 6)),
    st.builds(prefix, st.lists(st.integers(0, 9), min_size=2, max_size=2)),
    st.builds(
        padding,
        st.lists(st.integers(4, 9), min_size=2, max_size=2),
        st.none() | st.integers(0, 4),
        st.booleans(),
    ),
    st.builds(
        document,
        st.lists(st.integers(0, 2), min_size=4, max_size=4),
        st.lists(st.integers(0, 2), min_size=7, max_size=7),
    ),
)
any_mask = st.recursive(
    simple, lambda m: st.builds(lambda a, b, both: a & b if both else a | b, m, m, st.booleans())
)


@given(a=any_mask, b=any_mask, c=any_mask)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_and_or_are_those_of_matrices(a, b, c):
    dense = [x.dense(2, 4, 7) for x in (a, b, c)]
    np.testing.assert_array_equal((a & b).dense(2, 4, 7), dense[0] & dense[1])
    np.testing.assert_array_equal((a | b).dense(2, 4, 7), dense[0] | dense[1])
    np.testing.assert_array_equal((a & (b | c)).dense(2, 4, 7), dense[0] & (dense[1] | dense[2]))
    np.testing.assert_array_equal(((a & b) | c).dense(2, 4, 7), (dense[0] & dense[1]) | dense[2])


def lowered(mask):
    """The lowered form with lists in the place of arrays, which are checked to be what the extension reads."""

    def plain(part):
        if isinstance(part, np.ndarray):
            assert part.dtype == np.int64
            assert part.flags.c_contiguous
            assert 1 <= part.ndim <= 2
            return part.tolist()
        return type(part)(plain(x) for x in part) if isinstance(part, (tuple, list)) else part

    return plain(mask._lowered())


def test_lowering():
    assert lowered(causal()) == ("causal",)
    assert lowered(sliding_window(3)) == ("window", 3, 0)
    assert lowered(sliding_window(None, np.int32(2))) == ("window", None, 2)
    assert lowered(chunked(8)) == ("chunked", 8)
    assert lowered(block_causal(8)) == ("block_causal", 8)
    assert lowered(prefix(5)) == ("prefix", [5])
    assert lowered(prefix([5, 6])) == ("prefix", [5, 6])
    assert lowered(document([1, 2])) == ("document", [1, 2], None)
    assert lowered(document([[1, 2]], [3])) == ("document", [[1, 2]], [3])
    assert lowered(padding(5)) == ("padding", [5], None, False)
    assert lowered(padding([5, 6], 1, queries=True)) == ("padding", [5, 6], [1], True)
    a, b, c = causal(), chunked(2), prefix(3)
    assert lowered(a & b & c) == ("and", [("causal",), ("chunked", 2), ("prefix", [3])])
    assert lowered(a & (b & c)) == lowered(a & b & c)
    assert lowered(a | b | c) == ("or", [("causal",), ("chunked", 2), ("prefix", [3])])
    assert lowered(a & b | c) == ("or", [("and", [("causal",), ("chunked", 2)]), ("prefix", [3])])
    assert type(sliding_window(np.int64(3)).left) is int


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda x: np.array(x, np.int32),
        lambda x: np.array(x, np.uint8),
        lambda x: np.array(x, np.uint64),
        lambda x: np.repeat(np.array(x), 2)[::2],
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
        jax.numpy.asarray,
    ],
)
def test_integers_of_every_kind(convert):
    assert lowered(prefix(convert([2, 3]))) == ("prefix", [2, 3])
    assert lowered(document(convert([4, 4, 5]))) == ("document", [4, 4, 5], None)
    assert lowered(padding(convert([4, 5]), convert([1, 0]))) == ("padding", [4, 5], [1, 0], False)


@pytest.mark.parametrize("number", [3, np.int16(3), np.array(3), torch.tensor(3)], ids=repr)
def test_one_number_of_every_kind(number):
    assert lowered(prefix(number)) == ("prefix", [3])
    assert lowered(chunked(number)) == ("chunked", 3)
    assert lowered(sliding_window(number)) == ("window", 3, 0)


def test_masks_do_not_change():
    ids = np.array([1, 1, 2])
    mask = document(ids)
    before = mask.dense(1, 3, 3).copy()
    ids[:] = 7
    np.testing.assert_array_equal(mask.dense(1, 3, 3), before)
    with pytest.raises(ValueError, match="read-only"):
        mask.ids[0] = 5
    with pytest.raises(AttributeError):
        mask.ids = ids
    with pytest.raises(AttributeError):
        sliding_window(3).left = 4


def test_equality_is_identity():
    mask = prefix([1, 2])
    assert mask == mask  # noqa: PLR0124 - what is tested
    assert mask != prefix([1, 2])
    assert len({mask, mask, causal()}) == 2


def test_repr_is_readable():
    assert repr(causal()) == "causal()"
    assert repr(sliding_window(3)) == "sliding_window(left=3, right=0)"
    assert repr(chunked(8) & causal()) == "chunked(size=8) & causal()"
    assert repr((prefix(3) | causal()) & padding([5, 6], 1, queries=True)) == (
        "(prefix(3) | causal()) & padding([5, 6], leftpad=1, queries=True)"
    )
    assert repr(document(np.zeros((2, 9), int))) == "document(ids of shape (2, 9))"
    assert repr(document([1], [2, 2])) == "document(ids of shape (1,), key_ids of shape (2,))"
    assert len(repr(prefix(np.arange(1000)))) < 100


BAD = [
    (lambda: sliding_window(-1), ValueError, r"left: expected an integer from 0 or None, got -1"),
    (lambda: sliding_window(3, -2), ValueError, r"right: .*-2"),
    (lambda: sliding_window(1.5), TypeError, r"left: .*float"),
    (lambda: sliding_window(True), TypeError, r"left: .*bool"),
    (lambda: sliding_window("3"), TypeError, r"left: .*str"),
    (lambda: chunked(0), ValueError, r"size: expected an integer from 1, got 0"),
    (lambda: chunked(-4), ValueError, r"size: .*-4"),
    (lambda: chunked(None), TypeError, r"size: .*NoneType"),
    (lambda: block_causal(0), ValueError, r"size: .*0"),
    (lambda: block_causal(2.0), TypeError, r"size: .*float"),
    (lambda: prefix(-1), ValueError, r"lengths: .*-1"),
    (lambda: prefix([3, -7]), ValueError, r"lengths: .*-7"),
    (lambda: prefix([[3]]), ValueError, r"lengths: .*\(1, 1\)"),
    (lambda: prefix(3.0), TypeError, r"lengths: .*float"),
    (lambda: prefix(np.ones(2)), TypeError, r"lengths: .*float64"),
    (lambda: prefix([True, False]), TypeError, r"lengths: .*bool"),
    (lambda: prefix(None), TypeError, r"lengths: "),
    (lambda: prefix(torch.ones(2, dtype=torch.bfloat16)), TypeError, r"lengths: "),
    (lambda: prefix(torch.ones(2, dtype=torch.int64, device="meta")), TypeError, r"lengths: "),
    (lambda: prefix(np.array([2**63], np.uint64)), ValueError, r"lengths: .*9223372036854775808"),
    (lambda: document(3), ValueError, r"ids: .*\(\)"),
    (lambda: document(np.zeros((1, 2, 3), int)), ValueError, r"ids: .*\(1, 2, 3\)"),
    (lambda: document([1.0, 2.0]), TypeError, r"ids: .*float64"),
    (lambda: document([1, 2], ["a", "b"]), TypeError, r"key_ids: "),
    (lambda: document([[1], [1, 2]]), TypeError, r"ids: "),
    (lambda: padding(-1), ValueError, r"lengths: .*-1"),
    (lambda: padding(5, -1), ValueError, r"leftpad: .*-1"),
    (lambda: padding(5, 6), ValueError, r"leftpad: .*5.*6"),
    (lambda: padding([5, 5, 5], [5, 5, 6]), ValueError, r"leftpad: .*5.*6.*sequence 2"),
    (lambda: padding([5, 5, 5], [1, 1]), ValueError, r"leftpad: .*3.*2"),
    (lambda: padding(5, 1.5), TypeError, r"leftpad: .*float"),
    (lambda: padding(5, queries=1), TypeError, r"queries: .*int"),
    (lambda: document([1, 2]).dense(1, 3, 3), ValueError, r"ids: .*\(1, 3\).*\(2,\)"),
    (lambda: document([1, 2]).dense(1, 2, 3), ValueError, r"ids: .*\(1, 3\).*\(2,\)"),
    (lambda: document([1, 2], [1]).dense(1, 2, 3), ValueError, r"key_ids: .*\(1, 3\).*\(1,\)"),
    (lambda: prefix([1, 2]).dense(3, 2, 2), ValueError, r"lengths: .*\(3,\).*\(2,\)"),
    (lambda: padding(5, [1, 2]).dense(3, 2, 2), ValueError, r"leftpad: .*\(3,\).*\(2,\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_refused(case):
    call, exception, pattern = BAD[case]
    with pytest.raises(exception, match=pattern):
        call()


@pytest.mark.parametrize("other", [None, True, 3, np.ones((2, 2), bool)])
def test_masks_join_masks_only(other):
    for operation in (lambda: causal() & other, lambda: causal() | other):
        with pytest.raises(TypeError):
            operation()


def test_every_name_is_a_mask():
    for name in masks.__all__:
        assert issubclass(getattr(masks, name), Mask)
    with pytest.raises(NotImplementedError):
        Mask().dense(1, 1, 1)
