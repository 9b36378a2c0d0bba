"""The benchmark of masks."""

import pytest

import subquad
from subquad.cli.bench import masks
from subquad.cli.bench.mask_shape import MaskShape

pytestmark = pytest.mark.usefixtures("keep_threads")

SIZES = {"head_dim": 8, "dtypes": ("float32",)}
WINDOW = MaskShape(
    "a",
    **SIZES,
    queries=16,
    causal=True,
    window=3,
    threads=(1, 2),
    limit_ratio=1.25,
    torch_floor={"float32": 3},
)
MODIFIED = MaskShape(
    "b",
    **SIZES,
    queries=16,
    causal=True,
    threads=(2,),
    modifiers={"softcap": 1.25, "sinks": 1.05},
)
APART = MaskShape("c", **SIZES, lengths=(10, 20, 40), layout="apart", threads=(2,), limit_ratio=1.1)


@pytest.fixture
def fixed(replay):
    """Replaces the samples of every contender; a test may change them."""
    # In the second round everything is twice as slow, and torch is not there any more.
    samples = {
        "a/1": [2e-3, 4e-3, 2e-3],
        "a/2": [1e-3, 2e-3, 1e-3],
        "plain a/1": [4e-3, 8e-3, 4e-3],
        "plain a/2": [2e-3, 4e-3, 2e-3],
        "plain b/2": [2e-3, 4e-3, 2e-3],
        "torch a/1": [8e-3],
        "torch a/2": [5e-3],
        "b softcap/2": [2.5e-3, 5e-3, 2.5e-3],
        "b sinks/2": [2.2e-3, 4.4e-3, 2.2e-3],
        "c 10/2": [1e-3, 2e-3, 1e-3],
        "c 20/2": [1.9e-3, 3.8e-3, 1.9e-3],
        "c 40/2": [4.4e-3, 8.8e-3, 4.4e-3],
    }
    return replay(masks, samples)


def test_figures(fixed, make_settings):
    pytest.importorskip("torch")
    one, two = masks.measure(WINDOW, "float32", make_settings(use_torch=True))
    pairs = 1 + 2 + 3 + 13 * 4
    assert (one.threads, one.seconds, one.against, one.failure) == (1, 2e-3, "all keys", "")
    assert one.useful_rate == pytest.approx(2 * 16 * pairs / 2e-3)
    # Half of the time, for less than half of the work; the slow round says the same.
    assert one.ratio == pytest.approx(0.5 * (16 * 17 / 2) / pairs)
    assert (one.torch_ratio, two.torch_ratio) == (pytest.approx(4.0), pytest.approx(5.0))


def test_torch_is_timed_once_where_its_mask_is_of_all_pairs(fixed, make_settings):
    pytest.importorskip("torch")
    masks.measure(WINDOW, "float32", make_settings(use_torch=True))
    once = {name for name, rounds in fixed["rounds"].items() if rounds == 1}
    assert once == {"torch a/1", "torch a/2"}


def test_requirements_are_for_two_threads(fixed, make_settings, recorder):
    outcome = masks.run([(WINDOW, "float32")], make_settings(), recorder)
    names = ("against_limit", "torch_floor", "torch_ratio")
    assert [[one[name] for name in names] for one in outcome.records] == [
        [None, None, None],
        [1.25, 3, None],
    ]
    assert any("limit and asked" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("ours", "theirs", "cells"),
    [(9e-4, 2.7e-3, ("1.055 ", "3.00x ")), (1.2e-3, 3.5e-3, ("1.407!", "2.92x!"))],
)
def test_what_is_missed_is_marked(fixed, make_settings, recorder, ours, theirs, cells):
    pytest.importorskip("torch")
    fixed["a/2"], fixed["torch a/2"] = [ours, 2 * ours, ours], [theirs]
    outcome = masks.run([(WINDOW, "float32")], make_settings(use_torch=True), recorder)
    row = outcome.rows[1]
    assert (row[6], row[8]) == cells
    assert (row[7], row[9]) == ("1.25", "3x")
    assert outcome.failures == []  # a slow result is not a wrong one


def test_each_modifier_is_held_against_the_same_plain_call(fixed, make_settings, recorder):
    outcome = masks.run([(MODIFIED, "float32")], make_settings(), recorder)
    assert [(row[0], *row[5:8]) for row in outcome.rows] == [
        ("b softcap", "no modifier", "1.250 ", "1.25"),
        ("b sinks", "no modifier", "1.100!", "1.05"),
    ]
    assert [one["shape"] for one in outcome.records] == ["b softcap", "b sinks"]


def test_lengths_are_held_against_the_cheapest_by_token(fixed, make_settings, recorder):
    outcome = masks.run([(APART, "float32")], make_settings(), recorder)
    assert [(row[0], row[5], row[6]) for row in outcome.rows] == [
        ("c 10", "the cheapest length", "1.053 "),
        ("c 20", "the cheapest length", "1.000 "),
        ("c 40", "the cheapest length", "1.158!"),
    ]


def test_wrong_results(fixed, make_settings, recorder, spoil):
    spoil(subquad, "attention")
    outcome = masks.run([(WINDOW, "float32")], make_settings(), recorder)
    assert [row[-1] for row in outcome.rows] == ["ok", "WRONG"]
    assert outcome.failures == ["a/float32, threads=2: off by nan from the float64 oracle (allowed: 2e-06)"]
    assert outcome.records[1]["check"] != "ok"


@pytest.mark.usefixtures("quick")
def test_everything_takes_part(make_settings, recorder):
    pytest.importorskip("torch")
    settings = make_settings(use_torch=True)
    outcome = masks.run(masks.plan(settings), settings, recorder)
    assert [(row[0], row[1], row[2]) for row in outcome.rows] == [
        ("window", "float32", "1"),
        ("window", "bfloat16", "1"),
        ("padded", "float32", "1"),
        ("padded", "float32", "2"),
        ("modified softcap", "float32", "1"),
        ("modified sinks", "float32", "1"),
    ]
    assert {row[-1] for row in outcome.rows} == {"ok"}
    assert all(one["against_ratio"] > 0 for one in outcome.records)
    with_torch = [one["torch_ratio"] is not None for one in outcome.records]
    assert with_torch == [True, False, True, True, False, False]


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_is_left_out_where_numpy_has_none(fixed, make_settings, recorder):
    outcome = masks.run([(WINDOW, "bfloat16")], make_settings(), recorder)
    assert outcome.rows == []
    assert len(outcome.notes) == 1
    assert "bfloat16 was left out" in outcome.notes[0]


def test_progress(fixed, make_settings, recorder):
    masks.run([(MODIFIED, "float32")], make_settings(), recorder)
    assert recorder.stages == [("masks", 1)]
    assert recorder.details == ["b/float32: 1.250, 1.100 of the time of no modifier"]
