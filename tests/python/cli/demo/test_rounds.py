"""Interleaved rounds."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from subquad.cli.demo import rounds
from subquad.cli.demo.results import BASELINE, CANDIDATE


@pytest.fixture
def timed_runs(monkeypatch, clock):
    """Replaces the runs by ones that take so many seconds of a clock that nothing else moves."""
    lengths: list[tuple[int, int]] = []
    seconds = {"warm": 1.0, "measured": 10.0}

    patched_runs: list[bool] = []

    def run_once(_model, prompt, new_tokens, *, patched, show=None):
        patched_runs.append(patched)
        lengths.append((prompt.shape[1], new_tokens))
        clock.sleep(seconds["warm" if len(lengths) <= 2 else "measured"])
        return SimpleNamespace(prefill_seconds=2.0, decode_seconds=None)

    monkeypatch.setattr(rounds, "run_once", run_once)
    monkeypatch.setattr(rounds, "time", clock)
    return SimpleNamespace(lengths=lengths, seconds=seconds, patched=patched_runs)


def measure(model, prompt, fake, recorder, *, budget=1e9, new_tokens=4):
    return rounds.measure_rounds(
        model, prompt, new_tokens, time_budget=budget, stage=recorder, variants=fake.variants
    )


def test_real_runs(model, prompt, fake, recorder):
    runs, report = measure(model, prompt, fake, recorder)
    assert {name: len(each) for name, each in runs.items()} == {BASELINE: 3, CANDIDATE: 3}
    assert {run.implementation for run in runs[BASELINE]} == {"sdpa"}
    assert {run.implementation for run in runs[CANDIDATE]} == {"eager"}
    assert model.config._attn_implementation == "sdpa"
    assert len({run.tokens for each in runs.values() for run in each}) == 1
    assert report.computed == 3
    assert len(recorder.details) == 8
    assert recorder.details[:2] == ["sdpa: warm", "subquad: warm"]
    assert recorder.details[2].startswith("sdpa: prefill 0.")
    assert recorder.details[2].endswith(" ms/token")
    one_run = ["prefill, layer 1 of 2", "prefill, layer 2 of 2", *(f"token {i} of 4" for i in (2, 3, 4))]
    assert recorder.shown[:10] == [f"{name}: {each}" for name in (BASELINE, CANDIDATE) for each in one_run]
    assert len(recorder.shown) == 30


def test_the_order_turns_from_round_to_round(model, prompt, fake, recorder, timed_runs):
    measure(model, prompt, fake, recorder)
    a, b = BASELINE, CANDIDATE
    assert fake.log == [a, b, a, b, b, a, a, b]
    assert timed_runs.patched == [name == CANDIDATE for name in fake.log]


def test_the_warm_up_is_short(model, fake, recorder, timed_runs):
    import torch

    measure(model, torch.zeros(1, 4096, dtype=torch.int64), fake, recorder, new_tokens=64)
    assert timed_runs.lengths == [(128, 4)] * 2 + [(4096, 64)] * 6


def test_the_warm_up_is_no_longer_than_the_run(model, prompt, fake, recorder, timed_runs):
    measure(model, prompt, fake, recorder, new_tokens=2)
    assert set(timed_runs.lengths) == {(40, 2)}


# The warm-up takes 2 seconds, a round 20.
@pytest.mark.parametrize(
    ("budget", "count"), [(0.1, 1), (-5.0, 1), (41.9, 1), (42.0, 2), (61.9, 2), (62.0, 3), (1e9, 3)]
)
def test_rounds_that_fit_the_budget(model, prompt, fake, recorder, timed_runs, budget, count):
    runs, _ = measure(model, prompt, fake, recorder, budget=budget)
    assert [len(each) for each in runs.values()] == [count, count]
    assert recorder.details[-1] == f"{CANDIDATE if count % 2 else BASELINE}: prefill 2.00 s"
