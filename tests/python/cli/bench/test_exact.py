"""The benchmark of exact attention."""

import pytest

import subquad
from subquad.cli.bench import exact
from subquad.cli.bench.shapes import ExactShape

pytestmark = pytest.mark.usefixtures("keep_threads")

SHAPE = ExactShape(
    "a",
    64,
    8,
    ("float32",),
    heads=2,
    threads=(1, 2),
    floor={"avx2": {"float32": 50.0}, "scalar": {"float32": 20.0}},
)


@pytest.fixture
def fixed(replay):
    """Replaces the samples of every contender; a test may change them."""
    # In the second round everything is twice as slow.
    samples = {
        "subquad/1": [2e-6, 4e-6, 2e-6],
        "subquad/2": [1.25e-6, 2.5e-6, 1.25e-6],
        "peak/1": [4e11, 2e11, 4e11],
        "peak/2": [7e11, 3.5e11, 7e11],
        "torch/1": [6e-6, 12e-6, 6e-6],
        "torch/2": [5e-6, 10e-6, 5e-6],
    }
    return replay(exact, samples)


def test_figures(fixed, make_settings):
    pytest.importorskip("torch")
    one, two = exact.measure(SHAPE, "float32", make_settings(use_torch=True))
    flops = SHAPE.useful_flops
    assert flops == 2 * 2 * 64 * 64 * 16
    assert (one.threads, one.seconds, one.peak_flops, one.failure) == (1, 2e-6, 4e11, "")
    assert one.useful_rate == pytest.approx(flops / 2e-6)
    assert one.peak_share == pytest.approx(flops / 2e-6 / 4e11)  # the slow round says the same
    assert one.torch_ratio == pytest.approx(3.0)
    assert one.scaling is None
    assert two.torch_ratio == pytest.approx(4.0)
    assert two.scaling is not None
    assert two.scaling.base == 1
    assert two.scaling.ours == pytest.approx(1.6)
    assert two.scaling.peak == pytest.approx(1.75)


def test_without_torch(fixed, make_settings):
    assert {one.torch_ratio for one in exact.measure(SHAPE, "float32", make_settings())} == {None}


def test_the_scaling_is_told_beside_the_probes(fixed, make_settings, recorder):
    outcome = exact.run([(SHAPE, "float32")], make_settings(), recorder)
    assert "a/float32: 1.60x from 1 to 2 threads; the probe: 1.75x" in outcome.notes
    assert [one["scaling"] for one in outcome.records] == [None, pytest.approx(1.6)]
    assert [one["peak_scaling"] for one in outcome.records] == [None, pytest.approx(1.75)]


def test_a_busy_machine_slows_the_probe_too(fixed, make_settings, recorder):
    fixed["subquad/2"] = [2e-6, 2e-6, 2e-6]
    fixed["subquad/1"] = [2e-6, 2e-6, 2e-6]
    fixed["peak/2"] = fixed["peak/1"]
    outcome = exact.run([(SHAPE, "float32")], make_settings(), recorder)
    assert "a/float32: 1.00x from 1 to 2 threads; the probe: 1.00x" in outcome.notes


@pytest.mark.parametrize(
    ("level", "floors"), [("avx2", [None, 0.5]), ("scalar", [None, 0.2]), ("avx512", [None, None])]
)
def test_floors_are_for_the_level_and_two_threads(fixed, make_settings, recorder, monkeypatch, level, floors):
    monkeypatch.setattr(exact._native, "config", lambda: {"level": level})
    outcome = exact.run([(SHAPE, "float32")], make_settings(), recorder)
    assert [one["floor"] for one in outcome.records] == floors
    assert any("floor:" in note for note in outcome.notes) == (level != "avx512")


@pytest.mark.parametrize(("share", "cell"), [(0.5, "50.0% "), (0.49, "49.0%!")])
def test_what_is_below_the_floor_is_marked(fixed, make_settings, recorder, monkeypatch, share, cell):
    monkeypatch.setattr(exact._native, "config", lambda: {"level": "avx2"})
    fixed["peak/2"] = [SHAPE.useful_flops / seconds / share for seconds in fixed["subquad/2"]]
    outcome = exact.run([(SHAPE, "float32")], make_settings(), recorder)
    assert outcome.rows[1][6:8] == (cell, "50%")
    assert outcome.failures == []  # a slow result is not a wrong one


def test_wrong_results(fixed, make_settings, recorder, spoil):
    spoil(subquad, "attention")
    outcome = exact.run([(SHAPE, "float32")], make_settings(), recorder)
    assert [row[-1] for row in outcome.rows] == ["ok", "WRONG"]
    assert outcome.failures == ["a/float32, threads=2: off by nan from the float64 oracle (allowed: 2e-06)"]
    assert outcome.records[1]["check"] != "ok"


@pytest.mark.usefixtures("without_bfloat16")
def test_bfloat16_is_left_out_where_numpy_has_none(fixed, make_settings, recorder):
    outcome = exact.run([(SHAPE, "bfloat16")], make_settings(), recorder)
    assert outcome.rows == []
    assert "bfloat16 was left out" in outcome.notes[0]
    assert recorder.stages == [("exact", 0)]


def test_progress(fixed, make_settings, recorder):
    fixed["peak/1"] = fixed["peak/2"] = [1e13] * 3
    exact.run([(SHAPE, "float32")], make_settings(), recorder)
    assert recorder.stages == [("exact", 1)]
    assert recorder.details == ["a/float32: 1.3% of peak, 2.1% of peak"]
