"""Named shapes of training: checks, the count of useful work, and what is required."""

from itertools import product

import pytest

from subquad.cli.bench import shape_file
from subquad.cli.bench.backward_shape import BackwardShape

MINIMAL = {"name": "a", "queries": 24, "head_dim": 8, "dtypes": ["float32", "bfloat16"]}
WINDOW = {"causal": True, "window": 5}


def build(**changes) -> BackwardShape:
    return shape_file.build(BackwardShape, {**MINIMAL, **changes})


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"keys": 30, "causal": True}, WINDOW])
def test_useful_flops(changes):
    shape = build(**changes, batch=2, heads=6, kv_heads=3, head_dim_v=5)
    operations = 0
    for query, key in product(range(shape.queries), range(shape.keys)):
        distance = query + shape.keys - shape.queries - key
        if not shape.causal or 0 <= distance <= (shape.window or distance):
            operations += 2 * (8 + 5)  # q k, p v
            operations += 2 * (8 + 5)  # backward: q k anew, do v
            operations += 2 * (5 + 8 + 8)  # dv, dk, dq
    assert shape.useful_flops == operations * 2 * 6


def test_useful_flops_are_three_and_a_half_times_those_of_the_forward():
    shape = build(causal=True, heads=3)
    assert shape.useful_flops == 14 * 3 * (24 * 25 // 2) * 8


def test_options():
    assert build(causal=True).options() == {"causal": True}
    assert build(**WINDOW).options() == {"causal": True, "window_size": (5, 0)}


def test_without_the_window():
    dense = build(**WINDOW, limit_ratio=1.25).dense
    assert dense is not None
    assert (dense.window, dense.limit_ratio, dense.options()) == (0, 0, {"causal": True})
    assert build(causal=True).dense is None


def test_memory_limit():
    shape = build(batch=2, heads=3, limit_mib_per_thread=4)
    assert shape.memory_limit("float32", 2) == 8 * 2**20
    assert shape.memory_limit("bfloat16", 2) == 8 * 2**20 + 2 * 24 * 3 * 8 * 4
    assert build().memory_limit("bfloat16", 2) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 5}, "window needs causal, and as many keys as queries"),
        ({**WINDOW, "keys": 30}, "window needs causal, and as many keys as queries"),
        ({**WINDOW, "window": -1}, "window must be a whole number of at least 0"),
        ({"limit_ratio": 1.25}, "limit_ratio needs window"),
        ({"limit_ratio": -1}, "limit_ratio must be a number of at least 0"),
        ({"limit_mib_per_thread": "4"}, "limit_mib_per_thread must be a number of at least 0"),
        ({"floor": {"avx3": {"float32": 70}}}, "floor names avx3"),
        ({"torch_floor": {"float64": 2}}, "torch_floor must give a number for some of dtypes"),
        ({"walls": 3}, "unknown key walls"),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
