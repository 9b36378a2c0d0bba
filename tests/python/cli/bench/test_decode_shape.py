"""Named shapes of decoding: parsing, checks, and the count of bytes."""

import pytest

from subquad.cli.bench import decode, shape_file
from subquad.cli.bench.decode_shape import DecodeShape
from subquad.cli.errors import UserError

MINIMAL = {"name": "a", "head_dim": 8, "lengths": 20, "dtypes": ["float32"]}


def build(**changes) -> DecodeShape:
    return shape_file.build(DecodeShape, {**MINIMAL, **changes})


def test_sizes_that_follow_from_others():
    shape = build(batch=3, heads=6, kv_heads=2)
    assert (shape.queries, shape.keys, shape.lengths, shape.head_dim_v) == (1, 20, (20, 20, 20), 8)
    assert (shape.page_size, shape.layout, shape.append, shape.hot) == (0, "bhsd", False, False)


@pytest.mark.parametrize(("append", "counts"), [(False, [5, 9]), (True, [7, 11])])
def test_keys_of_each_sequence(append, counts):
    shape = build(batch=2, lengths=[5, 9], queries=2, append=append)
    assert [shape.keys_of(0), shape.keys_of(1)] == counts
    assert shape.keys == counts[1]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8)])
def test_every_key_and_value_is_counted_once(dtype, size):
    shape = build(batch=2, heads=6, kv_heads=3, head_dim_v=5, lengths=[5, 9], dtypes=[dtype])
    assert shape.read_bytes(dtype) == (5 + 9) * 3 * (8 + 5) * size


def test_useful_flops_of_each_sequence():
    shape = build(batch=2, heads=2, lengths=[5, 9], queries=2, causal=True)
    assert shape.useful_flops == 2 * 2 * (4 + 5 + 8 + 9) * (8 + 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": 0}, "lengths must be a whole number of at least 1, or a list .* got 0"),
        ({"lengths": 2.5}, r"lengths must be .* got 2\.5"),
        ({"lengths": True}, "lengths must be .* got True"),
        ({"lengths": [3, 4]}, r"lengths must be .* of the batch \(1\), got \[3, 4\]"),
        ({"lengths": [3, 0], "batch": 2}, r"lengths must be .* got \[3, 0\]"),
        ({"keys": 4}, "unknown key keys"),
        ({"queries": 0}, "queries must be a whole number of at least 1"),
        ({"page_size": -1}, "page_size must be a whole number of at least 0, got -1"),
        ({"page_size": True}, "page_size must be a whole number"),
        ({"page_size": 16}, "page_size needs layout bshd"),
        ({"layout": "bsdh"}, "layout must be one of bhsd, bshd, got 'bsdh'"),
        ({"append": 1}, "append must be true or false, got 1"),
        ({"hot": "no"}, "hot must be true or false"),
        ({"smoke": 0}, "smoke must be true or false"),
        ({"floor": {"avx2": {"bfloat16": 70}}}, "floor names bfloat16, which is .* not among dtypes"),
        ({"torch_floor": 5}, "torch_floor must give a number for some of dtypes, got 5"),
        ({"torch_floor": {"bfloat16": 5}}, "torch_floor must give a number for some of dtypes"),
        ({"torch_floor": {"float32": "5"}}, "torch_floor must be a number of at least 0, got '5'"),
        ({"limit_us": -1}, "limit_us must be a number of at least 0"),
        ({"limit_ratio": "2", "against": "b"}, "limit_ratio must be a number of at least 0"),
        ({"limit_ratio": 2}, "limit_ratio needs against"),
        ({"against": "a"}, "against must be the name of another shape, got 'a'"),
        ({"against": 3}, "against must be the name of another shape, got 3"),
        ({"dtypes": ["float8"]}, "dtypes must be a list of some of float32"),
        ({"limit_mib_per_thread": 3}, "unknown key limit_mib_per_thread"),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_missing_keys():
    with pytest.raises(ValueError, match="missing key head_dim, lengths"):
        shape_file.build(DecodeShape, {"name": "a", "dtypes": ["float32"]})


@pytest.mark.parametrize(("against", "dtypes"), [("absent", '["float32"]'), ("row", '["float64"]')])
def test_against_names_a_shape_of_the_same_dtypes(make_settings, shapes, against, dtypes):
    with shapes.open("a") as file:
        file.write(f'[[decode]]\nname = "b"\nhead_dim = 8\nlengths = 3\ndtypes = {dtypes}\n')
        file.write(f'against = "{against}"\n')
    message = f"decode b: against must name another decode shape that has all of its dtypes, got '{against}'"
    with pytest.raises(UserError, match=message):
        decode.plan(make_settings())
