"""The benchmark of forward and backward."""

import pytest

import subquad
from subquad.cli.bench import backward
from subquad.cli.bench.backward_shape import BackwardShape

pytestmark = pytest.mark.usefixtures("keep_threads")

SIZES = {"queries": 16, "head_dim": 8, "dtypes": ("float32",), "causal": True}
CAUSAL = BackwardShape(
    "a", **SIZES, threads=(1, 2), floor={"avx2": {"float32": 50.0}}, torch_floor={"float32": 2}
)
WINDOW = BackwardShape("b", **SIZES, window=3, threads=(2,), limit_ratio=1.25, torch_floor={"float32": 10})
MEASURED = BackwardShape("c", **SIZES, threads=(1, 2), limit_mib_per_thread=4)


@pytest.fixture
def fixed(replay):
    """Replaces the samples of every contender; a test may change them."""
    # In the second round everything is twice as slow, and a slow torch is not there any more.
    samples = {
        "subquad/1": [2e-6, 4e-6, 2e-6],
        "subquad/2": [1e-6, 2e-6, 1e-6],
        "dense/2": [2e-6, 4e-6, 2e-6],
        "peak/1": [4e11, 2e11, 4e11],
        "peak/2": [7e11, 3.5e11, 7e11],
        "torch/1": [6e-6, 12e-6, 6e-6],
        "torch/2": [5e-6, 10e-6, 5e-6],
    }
    return replay(backward, samples, level="avx2")


def test_figures(fixed, make_settings):
    pytest.importorskip("torch")
    one, two = backward.measure(CAUSAL, "float32", make_settings(use_torch=True))
    flops = 14 * (16 * 17 // 2) * 8
    assert (one.threads, one.seconds, one.peak_flops, one.failure) == (1, 2e-6, 4e11, "")
    assert one.useful_rate == pytest.approx(flops / 2e-6)
    assert one.peak_share == pytest.approx(flops / 2e-6 / 4e11)  # the slow round says the same
    assert (one.torch_ratio, two.torch_ratio) == (pytest.approx(3.0), pytest.approx(5.0))
    assert (one.dense_ratio, one.memory) == (None, None)


def test_requirements_are_for_two_threads(fixed, make_settings, recorder):
    outcome = backward.run([(CAUSAL, "float32")], make_settings(), recorder)
    assert [[one[name] for name in ("floor", "torch_floor")] for one in outcome.records] == [
        [None, None],
        [0.5, 2],
    ]
    assert {one["torch_ratio"] for one in outcome.records} == {None}


def test_a_window_is_held_against_all_keys_for_as_much_work(fixed, make_settings, recorder):
    outcome = backward.run([(WINDOW, "float32")], make_settings(), recorder)
    (one,) = outcome.records
    pairs = 1 + 2 + 3 + 13 * 4
    assert one["against"] == "all keys"
    assert one["against_ratio"] == pytest.approx(0.5 * (16 * 17 // 2) / pairs)
    assert one["against_limit"] == 1.25


def test_torch_is_timed_once_where_it_has_a_mask(fixed, make_settings):
    pytest.importorskip("torch")
    settings = make_settings(use_torch=True)
    (one,) = backward.measure(WINDOW, "float32", settings)
    assert {name for name, rounds in fixed["rounds"].items() if rounds == 1} == {"torch/2"}
    assert one.torch_ratio == pytest.approx(5.0)
    backward.measure(CAUSAL, "float32", settings)
    assert set(fixed["rounds"].values()) == {None}


@pytest.mark.parametrize(
    ("ours", "theirs", "cells"),
    [
        (1e-6, 10e-6, ("10.00x ", "10x", "1.172 ", "1.25")),
        (1.1e-6, 9e-6, ("8.18x!", "10x", "1.290!", "1.25")),
    ],
)
def test_what_is_missed_is_marked(fixed, make_settings, recorder, ours, theirs, cells):
    pytest.importorskip("torch")
    fixed["subquad/2"], fixed["torch/2"] = [ours, 2 * ours, ours], [theirs] * 3
    outcome = backward.run([(WINDOW, "float32")], make_settings(use_torch=True), recorder)
    assert tuple(outcome.rows[0][8:12]) == cells
    assert outcome.failures == []  # a slow result is not a wrong one


@pytest.mark.parametrize(("share", "cell"), [(0.5, "50.0% "), (0.49, "49.0%!")])
def test_what_is_below_the_floor_is_marked(fixed, make_settings, recorder, share, cell):
    fixed["peak/2"] = [CAUSAL.useful_flops / seconds / share for seconds in fixed["subquad/2"]]
    outcome = backward.run([(CAUSAL, "float32")], make_settings(), recorder)
    assert outcome.rows[1][6:8] == (cell, "50%")


def test_memory_at_each_thread_count(fixed, child, make_settings, recorder):
    requests = child(6 << 20)
    outcome = backward.run([(MEASURED, "float32")], make_settings(), recorder)
    assert [(request["table"], request["threads"]) for request in requests] == [
        ("backward", 1),
        ("backward", 2),
    ]
    assert [row[12:14] for row in outcome.rows] == [("6.00!", "4"), ("6.00 ", "8")]
    names = ("bytes", "limit", "method")
    assert [outcome.records[1][name] for name in names] == [6 << 20, 8 << 20, "sampled"]
    assert outcome.failures == []


def test_memory_unknown_or_wrong(fixed, child, make_settings, recorder):
    child(None, "dq off")
    outcome = backward.run([(MEASURED, "float32")], make_settings(), recorder)
    assert [row[12] for row in outcome.rows] == ["-", "-"]
    assert outcome.failures == ["c/float32, threads=1: dq off", "c/float32, threads=2: dq off"]


@pytest.mark.usefixtures("without_bfloat16")
def test_memory_needs_numpys_dtype(fixed, child, make_settings):
    pytest.importorskip("torch")
    requests = child(1)
    one, _ = backward.measure(MEASURED, "bfloat16", make_settings(use_torch=True))
    assert (one.memory, requests) == (None, [])


def test_wrong_results(fixed, make_settings, recorder, spoil):
    spoil(subquad, "attention_backward", of=1)
    outcome = backward.run([(CAUSAL, "float32")], make_settings(), recorder)
    assert [row[-1] for row in outcome.rows] == ["ok", "WRONG"]
    assert outcome.failures == [
        "a/float32, threads=2: dk off by nan from the float64 oracle (allowed: 1e-05)"
    ]
    assert outcome.records[1]["check"] != "ok"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("use_torch", [False, True])
def test_everything_takes_part(make_settings, recorder, use_torch):
    if use_torch:
        pytest.importorskip("torch")
    else:
        pytest.importorskip("ml_dtypes")
    settings = make_settings(use_torch=use_torch)
    outcome = backward.run(backward.plan(settings), settings, recorder)
    assert [(row[0], row[1], row[2]) for row in outcome.rows] == [
        ("train", "float32", "1"),
        ("train", "bfloat16", "1"),
        ("train window", "float32", "1"),
        ("train window", "float32", "2"),
    ]
    assert {row[-1] for row in outcome.rows} == {"ok"}
    assert [len(row) for row in outcome.rows] == [len(backward.COLUMNS)] * 4
    assert all((one["torch_ratio"] is not None) == use_torch for one in outcome.records)
    assert [one["against_ratio"] is not None for one in outcome.records] == [False, False, True, True]
    assert [one["limit"] for one in outcome.records] == [None, None, 100 * 2**20, 200 * 2**20]
    assert all(one["method"] in {"high-water mark", "sampled", "unavailable"} for one in outcome.records[2:])


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_is_left_out_where_numpy_has_none(fixed, make_settings, recorder):
    outcome = backward.run([(CAUSAL, "bfloat16")], make_settings(), recorder)
    assert outcome.rows == []
    assert len(outcome.notes) == 1
    assert "bfloat16 was left out" in outcome.notes[0]


def test_progress(fixed, make_settings, recorder):
    fixed["peak/1"] = fixed["peak/2"] = [1e12, 5e11, 1e12]
    backward.run([(CAUSAL, "float32")], make_settings(), recorder)
    assert recorder.stages == [("backward", 1)]
    assert recorder.details == ["a/float32: 0.8% of peak, 1.5% of peak"]
