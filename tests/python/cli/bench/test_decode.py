"""The benchmark of decoding."""

import pytest

import subquad
from subquad.cli.bench import decode
from subquad.cli.bench.decode_shape import DecodeShape

pytestmark = pytest.mark.usefixtures("keep_threads")

SHAPE = DecodeShape(
    "a",
    head_dim=8,
    dtypes=("float32",),
    heads=2,
    lengths=64,
    threads=(1, 2),
    floor={"avx2": {"float32": 50.0}},
    torch_floor={"float32": 3},
    limit_us=1.5,
    against="row",
    limit_ratio=1.5,
)
PLAIN = DecodeShape("b", head_dim=8, dtypes=("float32",), lengths=64)


@pytest.fixture
def fixed(replay):
    """Replaces the samples of every contender, at level avx2; a test may change them."""
    # In the second round everything is twice as slow.
    samples = {
        "subquad/1": [2e-6, 4e-6, 2e-6],
        "subquad/2": [1.25e-6, 2.5e-6, 1.25e-6],
        "read/1": [8e9, 4e9, 8e9],
        "read/2": [1e10, 5e9, 1e10],
        "torch/1": [6e-6, 12e-6, 6e-6],
        "torch/2": [5e-6, 10e-6, 5e-6],
        "against/1": [1e-6, 2e-6, 1e-6],
        "against/2": [1e-6, 2e-6, 1e-6],
    }
    return replay(decode, samples, level="avx2")


def test_figures(fixed, make_settings):
    pytest.importorskip("torch")
    settings = make_settings(use_torch=True)
    one, two = decode.measure(SHAPE, PLAIN, "float32", settings)
    size = SHAPE.read_bytes("float32")
    assert size == 64 * 2 * 16 * 4
    assert (one.threads, one.seconds, one.read_rate, one.failure) == (1, 2e-6, 8e9, "")
    assert one.rate == pytest.approx(size / 2e-6)
    assert one.read_share == pytest.approx(size / 2e-6 / 8e9)  # the slow round says the same
    assert one.torch_ratio == pytest.approx(3.0)
    assert one.shape_ratio == pytest.approx(2.0)
    assert (two.torch_ratio, two.shape_ratio) == (pytest.approx(4.0), pytest.approx(1.25))


def test_without_torch_and_other_shapes(fixed, make_settings):
    (one,) = decode.measure(PLAIN, None, "float32", make_settings())
    assert (one.torch_ratio, one.shape_ratio) == (None, None)
    assert one.required == decode.Required(None, None, None, None)


def test_requirements_are_for_the_level_and_two_threads(fixed, make_settings, recorder, monkeypatch):
    outcome = decode.run([(SHAPE, "float32")], make_settings(), recorder)
    names = ("floor", "torch_floor", "limit", "against_limit")
    assert [[one[name] for name in names] for one in outcome.records] == [
        [None] * 4,
        [0.5, 3, pytest.approx(1.5e-6), 1.5],
    ]
    assert any("floor, asked" in note for note in outcome.notes)
    monkeypatch.setattr(decode._native, "config", lambda: {"level": "avx512"})
    outcome = decode.run([(SHAPE, "float32")], make_settings(), recorder)
    assert [one["floor"] for one in outcome.records] == [None, None]


def test_what_is_met(fixed, make_settings, recorder):
    pytest.importorskip("torch")
    outcome = decode.run([(SHAPE, "float32")], make_settings(use_torch=True), recorder)
    assert outcome.rows[0][3:12] == ("2.0", "-", "4.1", "51.2%", "-", "3.00x", "-", "2.00x", "-")
    assert outcome.rows[1][3:12] == (
        *("1.2 ", "1.5", "6.6", "65.5% ", "50%"),
        *("4.00x ", "3x", "1.25x ", "1.5x"),
    )
    assert "a/float32, threads=2: 1.25x the time of row" in outcome.notes
    assert [one["against"] for one in outcome.records] == ["row", "row"]


def test_what_is_missed_is_marked(fixed, make_settings, recorder):
    pytest.importorskip("torch")
    fixed["subquad/2"] = [2e-6, 4e-6, 2e-6]
    outcome = decode.run([(SHAPE, "float32")], make_settings(use_torch=True), recorder)
    row = outcome.rows[1]
    assert (row[3], row[6], row[8], row[10]) == ("2.0!", "41.0%!", "2.50x!", "2.00x!")
    assert outcome.failures == []  # a slow result is not a wrong one


def test_absent_figures_are_dashes(fixed, make_settings, recorder):
    outcome = decode.run([(PLAIN, "float32")], make_settings(), recorder)
    assert outcome.rows[0][8:12] == ("-", "-", "-", "-")
    assert outcome.records[0]["against"] is None


def test_wrong_results(fixed, make_settings, recorder, spoil):
    spoil(subquad, "attention_with_kvcache")
    outcome = decode.run([(SHAPE, "float32")], make_settings(), recorder)
    assert [row[-1] for row in outcome.rows] == ["ok", "WRONG"]
    assert outcome.failures == ["a/float32, threads=2: off by nan from the float64 oracle (allowed: 2e-06)"]
    assert outcome.records[1]["check"] != "ok"


@pytest.mark.usefixtures("quick")
def test_a_selected_shape_brings_the_one_it_is_against(make_settings, recorder):
    settings = make_settings(pattern="pages")
    outcome = decode.run(decode.plan(settings), settings, recorder)
    assert [row[0] for row in outcome.rows] == ["pages", "pages"]
    assert [row[-1] for row in outcome.rows] == ["ok", "ok"]
    assert all(one["against_ratio"] > 0 for one in outcome.records)


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_is_left_out_where_numpy_has_none(fixed, make_settings, recorder):
    outcome = decode.run([(PLAIN, "bfloat16")], make_settings(), recorder)
    assert outcome.rows == []
    assert len(outcome.notes) == 1
    assert "bfloat16 was left out" in outcome.notes[0]


def test_progress(fixed, make_settings, recorder):
    decode.run([(SHAPE, "float32")], make_settings(), recorder)
    assert recorder.stages == [("decode", 1)]
    assert recorder.details == ["a/float32: 51.2% of read, 65.5% of read"]
