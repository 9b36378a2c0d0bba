"""Turns, samples and ratios, on a clock that only the contenders move."""

import pytest

from subquad.cli.bench import timing
from subquad.cli.bench.timing import Contender, interleave, paired_ratio, timed, timed_once


@pytest.fixture(autouse=True)
def fake_time(monkeypatch, clock):
    monkeypatch.setattr(timing, "time", clock)


@pytest.mark.parametrize("seconds", [1e-6, 3e-5, 0.004, 0.5])
def test_a_sample_is_the_mean_of_one_call(clock, seconds):
    calls = []
    sample = timed(lambda: (calls.append(None), clock.sleep(seconds)))
    assert sample() == pytest.approx(seconds)
    calls.clear()
    start = clock.now
    assert sample() == pytest.approx(seconds)
    if seconds < timing._SAMPLE_SECONDS:
        expected = timing._SAMPLE_SECONDS + timing._WARM_SECONDS
        assert clock.now - start == pytest.approx(expected, abs=2 * seconds + 1e-9, rel=0.01)
    else:
        assert len(calls) == 1


def test_the_first_slow_calls_do_not_count(clock):
    slow = iter([1.0, 0.1])
    sample = timed(lambda: clock.sleep(next(slow, 0.001)))
    assert sample() == pytest.approx(0.001)


def test_a_disturbed_first_sample_does_not_shorten_the_later_ones(clock):
    disturbed = iter([0.02] * 4)
    sample = timed(lambda: clock.sleep(next(disturbed, 0.001)))
    assert sample() == pytest.approx(0.02)
    assert sample() == pytest.approx(0.02)
    sample()
    start = clock.now
    assert sample() == pytest.approx(0.001)
    assert clock.now - start == pytest.approx(timing._SAMPLE_SECONDS + timing._WARM_SECONDS, rel=0.1)


def test_turns(clock):
    log = []

    def contender(name: str, value: float) -> Contender:
        def measure() -> float:
            log.append(f"{name} measured")
            return value

        return Contender(name, measure, lambda: log.append(f"{name} prepared"))

    samples = interleave([contender("a", 1.0), contender("b", 2.0)], repeat=2, time_budget=1.0)
    assert samples == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert log == ["a prepared", "a measured", "b prepared", "b measured"] * 2


def test_a_slow_call_is_made_once(clock):
    calls = []
    sample = timed_once(lambda: (calls.append(None), clock.sleep(3.0)))
    assert sample() == pytest.approx(3.0)
    assert len(calls) == 1


def test_some_take_part_in_the_first_rounds_only(clock):
    field = [Contender("a", lambda: 1.0), Contender("b", lambda: 2.0, rounds=1)]
    assert interleave(field, repeat=3, time_budget=1.0) == {"a": [1.0] * 3, "b": [2.0]}


def test_every_sample_waits_for_threads_to_settle(clock):
    start = clock.now
    interleave([Contender("a", lambda: 1.0)], repeat=3, time_budget=1.0)
    assert clock.now - start == pytest.approx(3 * timing._SETTLE_SECONDS)


@pytest.mark.parametrize(("budget", "rounds"), [(0.001, 3), (3.05, 3), (3.5, 4), (1e9, 15)])
def test_rounds_that_fit_the_budget(clock, budget, rounds):
    def measure() -> float:
        clock.sleep(1.0)
        return 1.0

    assert len(interleave([Contender("a", measure)], repeat=15, time_budget=budget)["a"]) == rounds


def test_ratios_are_taken_within_rounds():
    # Both slow down together: every round says 2, whatever the medians of each say.
    assert paired_ratio([2.0, 8.0, 4.0], [1.0, 4.0, 2.0]) == 2.0
    assert paired_ratio([1.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 2.0])
