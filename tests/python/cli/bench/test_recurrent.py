"""The benchmark of recurrent operators."""

from contextlib import nullcontext

import pytest

from subquad import ops
from subquad.cli.bench import memory_child, recurrent, recurrent_calls
from subquad.cli.bench.recurrent_shape import RecurrentShape
from subquad.cli.peak_memory import Peak

pytestmark = pytest.mark.usefixtures("keep_threads")

SIZES = {"sizes": {"H": 2, "K": 8, "V": 6}, "dtypes": ("float32",)}
DELTA = RecurrentShape(
    "a",
    "gated_delta_rule",
    **SIZES,
    tokens=(40,),
    threads=(1, 2),
    floor={"avx2": {"float32": 45.0}},
    torch_floor={"float32": 8},
)
LENGTHS = RecurrentShape(
    "b", "kda", **SIZES, tokens=(40, 20), threads=(2,), against="lengths", limit_ratio=1.1
)
ATTENTION = RecurrentShape(
    "c", "retention", **SIZES, tokens=(40, 20), threads=(2,), against="attention", limit_ratio=1
)
STEP = RecurrentShape(
    "d", "gated_delta_rule", **SIZES, form="step", threads=(2,), floor={"avx2": {"float32": 60.0}}
)
TRAINED = RecurrentShape(
    "e", "delta_rule", **SIZES, tokens=(40,), form="training", threads=(2,), limit_ratio=3.5
)
MEASURED = RecurrentShape("f", "kda", **SIZES, tokens=(40,), threads=(1, 2), limit_mib_per_thread=4)


@pytest.fixture
def fixed(replay):
    """Replaces the samples of every contender, at level avx2; a test may change them."""
    # In the second round everything is twice as slow.
    seconds = {
        "a/1": 2e-3,
        "a/2": 1e-3,
        "torch a/1": 12e-3,
        "torch a/2": 9e-3,
        "b 40/2": 4.2e-3,
        "b 20/2": 2e-3,
        "c 40/2": 1e-3,
        "c 20/2": 1e-3,
        "base c 40/2": 2e-3,
        "base c 20/2": 0.8e-3,
        "d/2": 1e-6,
        "e/2": 3e-3,
        "base e/2": 1e-3,
        "f/1": 2e-3,
        "f/2": 1e-3,
    }
    samples = {name: [each, 2 * each, each] for name, each in seconds.items()}
    samples |= {f"peak/{count}": [rate, rate / 2, rate] for count, rate in ((1, 4e10), (2, 8e10))}
    return replay(recurrent, samples, level="avx2")


def cells(outcome) -> list[dict[str, str]]:
    headings = [column.heading for column in recurrent.COLUMNS]
    return [dict(zip(headings, row, strict=True)) for row in outcome.rows]


def test_figures(fixed, make_settings):
    pytest.importorskip("transformers")
    notes: list[str] = []
    one, two = recurrent.measure(DELTA, "float32", make_settings(use_torch=True), notes)
    flops = 40 * 2 * (6 * 48 + 64 * 14)
    assert (one.threads, one.seconds, one.failure, notes) == (1, 2e-3, "", [])
    assert one.peak == recurrent.Peak("f32", 4e10, pytest.approx(flops / 2e-3 / 4e10))  # as in the slow round
    assert (one.torch_ratio, two.torch_ratio) == (pytest.approx(6.0), pytest.approx(9.0))
    assert (one.against, one.against_ratio, one.memory) == ("", None, None)


def test_requirements_are_for_the_level_and_two_threads(fixed, make_settings, recorder, monkeypatch):
    outcome = recurrent.run([(DELTA, "float32")], make_settings(), recorder)
    names = ("floor", "torch_floor", "torch_ratio")
    assert [[one[name] for name in names] for one in outcome.records] == [[None] * 3, [0.45, 8, None]]
    monkeypatch.setattr(recurrent._native, "config", lambda: {"level": "avx512"})
    outcome = recurrent.run([(DELTA, "float32")], make_settings(), recorder)
    assert [one["floor"] for one in outcome.records] == [None, None]


@pytest.mark.parametrize(
    ("share", "theirs", "expected"),
    [(0.5, 9e-3, ("50.0% ", "45%", "9.00x ", "8x")), (0.4, 7e-3, ("40.0%!", "45%", "7.00x!", "8x"))],
)
def test_what_is_missed_is_marked(fixed, make_settings, recorder, share, theirs, expected):
    pytest.importorskip("transformers")
    fixed["torch a/2"] = [theirs, 2 * theirs, theirs]
    fixed["peak/2"] = [DELTA.useful_flops / seconds / share for seconds in fixed["a/2"]]
    outcome = recurrent.run([(DELTA, "float32")], make_settings(use_torch=True), recorder)
    row = cells(outcome)[1]
    assert tuple(row[name] for name in ("of peak", "floor", "vs fallback", "asked")) == expected
    assert outcome.failures == []  # a slow result is not a wrong one


def test_lengths_are_held_against_each_other_by_the_time_of_a_token(fixed, make_settings, recorder):
    outcome = recurrent.run([(LENGTHS, "float32")], make_settings(), recorder)
    rows = cells(outcome)
    assert [row["work"] for row in rows] == ["b 40", "b 20"]
    assert [(row["held against"], row["ratio"], row["limit"]) for row in rows] == [
        ("the cheapest length", "1.050 ", "1.1"),
        ("the cheapest length", "1.000 ", "1.1"),
    ]
    assert [one["against_ratio"] for one in outcome.records] == [pytest.approx(1.05), 1.0]


def test_each_length_is_held_against_attention(fixed, make_settings, recorder):
    outcome = recurrent.run([(ATTENTION, "float32")], make_settings(), recorder)
    assert [(row["held against"], row["ratio"], row["limit"]) for row in cells(outcome)] == [
        ("exact attention", "0.500 ", "1"),
        ("exact attention", "1.250!", "1"),
    ]


def test_steps_are_held_against_their_states(fixed, make_settings, recorder):
    outcome = recurrent.run([(STEP, "float32")], make_settings(), recorder)
    (row,), (one,) = cells(outcome), outcome.records
    # Read and written: 96 numbers.
    assert (row["form"], row["rate"], row["peak"], row["of peak"]) == (
        "step",
        "0.8 GB/s",
        "80 update",
        "1.0%!",
    )
    assert (one["useful_bytes"], one["useful_flops"]) == (768, None)
    assert (one["peak_bytes"], one["peak_flops"], one["peak_kind"]) == (8e10, None, "update")


def test_training_is_held_against_forward_alone(fixed, make_settings, recorder, monkeypatch):
    pytest.importorskip("torch")
    made = recurrent_calls.make(TRAINED, "float32", use_torch=True)
    assert made.base is not None
    monkeypatch.setattr(recurrent_calls.RecurrentCalls, "check", lambda *_: recurrent.Check(1e-7))
    outcome = recurrent.run([(TRAINED, "float32")], make_settings(use_torch=True), recorder)
    (row,), (one,) = cells(outcome), outcome.records
    assert (row["held against"], row["ratio"], row["limit"]) == ("forward alone", "3.000 ", "3.5")
    assert (row["rate"], row["peak"], row["of peak"], row["floor"]) == ("-",) * 4
    assert (one["call"], one["peak_kind"], one["useful_flops"], one["useful_bytes"]) == (
        "training",
        None,
        None,
        None,
    )


def test_training_is_left_out_without_torch(fixed, make_settings, recorder):
    outcome = recurrent.run([(TRAINED, "float32"), (STEP, "float32")], make_settings(), recorder)
    assert [row[0] for row in outcome.rows] == ["d"]
    assert outcome.notes[0].startswith("training was left out")


def test_fallbacks_that_there_are_not_are_told_once(fixed, make_settings, recorder, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("subquad.cli.bench.recurrent_fallbacks.find_spec", lambda _: None)
    outcome = recurrent.run([(DELTA, "float32")] * 2, make_settings(use_torch=True), recorder)
    assert [row["vs fallback"] for row in cells(outcome)] == ["-"] * 4
    assert outcome.notes[:-1] == ["transformers is not installed: no fallbacks to compare with"]


def test_memory_at_each_thread_count(fixed, child, make_settings, recorder):
    requests = child(6 << 20)
    outcome = recurrent.run([(MEASURED, "float32")], make_settings(), recorder)
    assert [(request["table"], request["threads"]) for request in requests] == [
        ("recurrent", 1),
        ("recurrent", 2),
    ]
    assert [(row["MiB"], row["limit MiB"]) for row in cells(outcome)] == [("6.00!", "4"), ("6.00 ", "8")]
    names = ("bytes", "limit", "method")
    assert [outcome.records[1][name] for name in names] == [6 << 20, 8 << 20, "sampled"]
    assert outcome.failures == []


def test_memory_unknown_or_wrong(fixed, child, make_settings, recorder):
    child(None, "out off")
    outcome = recurrent.run([(MEASURED, "float32")], make_settings(), recorder)
    assert [row["MiB"] for row in cells(outcome)] == ["-", "-"]
    assert outcome.failures == ["f/float32, threads=1: out off", "f/float32, threads=2: out off"]


@pytest.mark.usefixtures("without_bfloat16")
def test_memory_needs_numpys_dtype(fixed, child, make_settings):
    pytest.importorskip("torch")
    requests = child(1)
    one, _ = recurrent.measure(MEASURED, "bfloat16", make_settings(use_torch=True), [])
    assert (one.memory, requests) == (None, [])


def test_memory_of_what_is_returned_does_not_count(monkeypatch):
    results = 40 * 2 * 6 * 4
    for used, expected in ((results + 5, 5), (results - 1, 0), (None, None)):
        peak = Peak(used, "sampled")
        monkeypatch.setattr(memory_child, "peak_memory", lambda peak=peak: nullcontext(peak))
        assert memory_child._recurrent(MEASURED, "float32", 1) == (expected, "sampled", "")


def test_wrong_results(fixed, make_settings, recorder, spoil):
    spoil(ops, "chunk_gated_delta_rule", (0, 0, 1, 0), of=0)
    outcome = recurrent.run([(DELTA, "float32")], make_settings(), recorder)
    assert [row[-1] for row in outcome.rows] == ["ok", "WRONG"]
    assert outcome.failures == [
        "a/float32, threads=2: out off by nan from the float64 oracle (allowed: 1e-05)"
    ]
    assert outcome.records[1]["check"] != "ok"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("use_torch", [False, True])
def test_everything_takes_part(make_settings, recorder, use_torch):
    if use_torch:
        pytest.importorskip("transformers")
    else:
        pytest.importorskip("ml_dtypes")
    settings = make_settings(use_torch=use_torch)
    outcome = recurrent.run(recurrent.plan(settings), settings, recorder)
    trained = [("trained", "training", "float32", "1")] if use_torch else []
    assert [row[:4] for row in outcome.rows] == [
        ("delta", "forward", "float32", "1"),
        ("delta", "forward", "bfloat16", "1"),
        ("lengths 40", "forward", "float32", "1"),
        ("lengths 20", "forward", "float32", "1"),
        ("lengths 40", "forward", "float32", "2"),
        ("lengths 20", "forward", "float32", "2"),
        ("one more", "step", "float32", "1"),
        *trained,
    ]
    assert {row[-1] for row in outcome.rows} == {"ok"}
    ratios = [one["torch_ratio"] is not None for one in outcome.records]
    assert ratios == [use_torch, *[False] * 6, *[True] * len(trained)]
    assert [one["bytes"] is not None for one in outcome.records[2:6]] == [True] * 4


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_is_left_out_where_numpy_has_none(fixed, make_settings, recorder):
    outcome = recurrent.run([(DELTA, "bfloat16")], make_settings(), recorder)
    assert outcome.rows == []
    assert len(outcome.notes) == 1
    assert "bfloat16 was left out" in outcome.notes[0]


def test_progress(fixed, make_settings, recorder):
    recurrent.run([(DELTA, "float32")], make_settings(), recorder)
    assert recorder.stages == [("recurrent", 1)]
    assert recorder.details == ["a/float32: 2.000 ms, 1.000 ms"]
