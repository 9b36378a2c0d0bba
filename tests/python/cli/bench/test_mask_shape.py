"""Named shapes of masks: parsing, checks, the calls that follow, and the count of useful work."""

import numpy as np
import pytest

from subquad import masks
from subquad.cli.bench import shape_file
from subquad.cli.bench.mask_shape import MaskShape, alibi_slopes

MINIMAL = {"name": "a", "head_dim": 8, "dtypes": ["float32"]}
ONE = {"queries": 24, "causal": True}


def build(**changes) -> MaskShape:
    return shape_file.build(MaskShape, {**MINIMAL, **changes})


@pytest.mark.parametrize(
    ("layout", "sizes"), [("padded", (3, 9, 9)), ("packed", (1, 16, 16)), ("apart", (1, 9, 9))]
)
def test_sizes_that_follow_from_the_lengths(layout, sizes):
    shape = build(lengths=[3, 9, 4], layout=layout)
    assert (shape.batch, shape.queries, shape.keys) == sizes


@pytest.mark.parametrize("queries", [1, 5, 6, 7, 24])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_useful_flops_of_a_window(queries, window):
    shape = build(queries=queries, window=window, causal=True, heads=3, head_dim_v=5)
    seen = masks.sliding_window(window).dense(1, queries, queries)
    assert shape.useful_flops == 2 * 3 * int(seen.sum()) * (8 + 5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_useful_flops_of_several_sequences(layout, causal):
    shape = build(lengths=[3, 9, 4], layout=layout, causal=causal, heads=2)
    pairs = 6 + 45 + 10 if causal else 9 + 81 + 16
    assert shape.useful_flops == 2 * 2 * pairs * 16
    assert sum(part.useful_flops for part in shape.plain()) == shape.useful_flops


def test_calls_apart():
    calls = build(lengths=[8, 24], layout="apart", causal=True, window=5, limit_ratio=1.1).calls()
    assert [(each.name, each.queries, each.window, each.lengths) for each in calls] == [
        ("a 8", 8, 5, ()),
        ("a 24", 24, 5, ()),
    ]
    assert {each.limit for each in calls} == {1.1}


def test_each_modifier_has_a_call_and_a_limit_of_its_own():
    shape = build(**ONE, window=5, modifiers={"softcap": 1.25, "sinks": 1.05})
    assert [(each.name, each.limit, dict(each.modifiers)) for each in shape.calls()] == [
        ("a softcap", 1.25, {"softcap": 1.25}),
        ("a sinks", 1.05, {"sinks": 1.05}),
    ]
    (plain,) = shape.plain()
    assert (plain.options(), plain.useful_flops > shape.useful_flops) == ({"causal": True}, True)


@pytest.mark.parametrize(
    ("changes", "against"),
    [
        ({**ONE, "window": 5}, "all keys"),
        ({**ONE, "modifiers": {"alibi": 1}}, "no modifier"),
        ({"lengths": [3, 9], "layout": "padded"}, "each alone"),
        ({"lengths": [3, 9], "layout": "packed"}, "each alone"),
        ({"lengths": [3, 9], "layout": "apart"}, "the cheapest length"),
    ],
)
def test_what_calls_are_held_against(changes, against):
    assert build(**changes).against == against


def test_options():
    shape = build(**ONE, window=5, modifiers={"softcap": 0, "alibi": 0, "sinks": 0}, heads=4)
    options, some = shape.options(), shape.options(slice(1, 3))
    assert (options["causal"], options["window_size"], options["softcap"]) == (True, (5, 0), 50.0)
    for name in ("alibi_slopes", "sinks"):
        assert (options[name].shape, options[name].dtype) == ((4,), np.float32)
        np.testing.assert_array_equal(some[name], options[name][1:3])
    padded = build(lengths=[3, 9], layout="padded").options()
    np.testing.assert_array_equal(
        padded["mask"].dense(2, 9, 9), masks.padding([3, 9], queries=True).dense(2, 9, 9)
    )


def test_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-power for power in range(1, 9)])
    assert alibi_slopes(16)[0] == pytest.approx(2**-0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "queries must be a whole number of at least 1, got 0"),
        ({"batch": 2, "queries": 3}, "unknown key batch"),
        ({"keys": 2, "queries": 3}, "unknown key keys"),
        ({"lengths": [], "layout": "padded"}, r"lengths must be a list of whole numbers .* got \[\]"),
        ({"layout": "padded"}, "lengths must be a list"),
        ({"lengths": 3, "layout": "padded"}, "lengths must be a list .* got 3"),
        ({"lengths": [3, 0], "layout": "padded"}, r"lengths must be .* got \[3, 0\]"),
        ({"lengths": [3, True], "layout": "padded"}, "lengths must be"),
        ({"lengths": [3, 4]}, "layout must be one of padded, packed, apart, got ''"),
        ({"lengths": [3, 4], "layout": "loose"}, "layout must be one of .* got 'loose'"),
        ({"lengths": [3, 4], "layout": "packed", "queries": 7}, "queries follows from lengths"),
        ({"lengths": [3, 3], "layout": "apart"}, "lengths must be at least two, none of them twice"),
        ({"lengths": [3], "layout": "apart"}, "lengths must be at least two"),
        ({**ONE, "window": -1}, "window must be a whole number of at least 0"),
        ({"queries": 3, "window": 2}, "window needs causal, and as many keys as queries"),
        ({"queries": 3, "modifiers": {"alibi": 1}}, "modifiers need causal"),
        (
            {"lengths": [3, 4], "layout": "packed", "causal": True, "window": 2},
            "window needs one sequence, or layout apart",
        ),
        ({**ONE, "modifiers": {"bias": 1}}, "modifiers must give a number for some of softcap, alibi, sinks"),
        ({**ONE, "modifiers": 1.1}, "modifiers must give a number"),
        ({**ONE, "modifiers": {"alibi": "1"}}, "modifiers must be a number of at least 0"),
        (
            {"lengths": [3, 4], "layout": "packed", "causal": True, "modifiers": {"alibi": 1}},
            "modifiers need one sequence",
        ),
        ({**ONE, "modifiers": {"alibi": 1}, "limit_ratio": 2}, "limit_ratio is given by modifiers"),
        ({**ONE, "limit_ratio": -1}, "limit_ratio must be a number of at least 0"),
        ({**ONE, "torch_floor": {"float64": 5}}, "torch_floor must give a number for some of dtypes"),
        ({**ONE, "torch_floor": {"float32": 5}}, "torch_floor needs layout padded without causal"),
        (
            {**ONE, "window": 3, "modifiers": {"alibi": 1}, "torch_floor": {"float32": 5}},
            "torch_floor needs layout padded without causal, or one sequence",
        ),
        (
            {"lengths": [3, 4], "layout": "padded", "causal": True, "torch_floor": {"float32": 5}},
            "torch_floor needs layout padded without causal",
        ),
        (
            {"lengths": [3, 4], "layout": "packed", "torch_floor": {"float32": 5}},
            "torch_floor needs layout padded without causal",
        ),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
