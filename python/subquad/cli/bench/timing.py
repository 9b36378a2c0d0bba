"""Fair timing: contenders take turns in one process, and ratios are taken within each turn.

A processor's clock moves over seconds, so two numbers are compared only if they were measured side by side.
Each round measures every contender once; a ratio is the median over the rounds of the ratio within the round.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

# A sample shorter than this would be at the mercy of the clock and of single interrupts.
_SAMPLE_SECONDS = 0.01
_WARM_SECONDS = 0.005
# torch's OpenMP threads go on spinning for some milliseconds after a call and would take a core from the next
# contender.
_SETTLE_SECONDS = 0.02
_MIN_ROUNDS = 3


@dataclass
class Contender:
    """Something that is measured in turn with others.

    Attributes:
        name: What it is called.
        measure: Takes one sample: seconds for one call, or the rate of a probe.
        prepare: Called before each sample, not timed.
        rounds: The first rounds that it takes part in; `None` for all.
    """

    name: str
    measure: Callable[[], float]
    prepare: Callable[[], object] = field(default=lambda: None)
    rounds: int | None = None


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that takes one sample of `call`: its mean seconds.

    A sample is as many calls as fill 10 ms, after a warm-up of 5 ms that counts them. Calls that have never
    been quicker than a sample are warmed up only before the first one, and a sample is one of them. How many is
    counted anew each time: a first sample that others disturbed must not make the later ones short and cold.
    """
    fastest = math.inf

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def warm_up() -> float:
        start, calls = time.perf_counter(), 0
        while True:
            call()
            calls += 1
            elapsed = time.perf_counter() - start
            if elapsed >= _WARM_SECONDS:
                return elapsed / calls

    def sample() -> float:
        nonlocal fastest
        if fastest == math.inf:
            call()
        known_long = _SAMPLE_SECONDS <= fastest < math.inf
        estimate = fastest if known_long else warm_up()
        seconds = run(max(1, round(_SAMPLE_SECONDS / max(estimate, 1e-9))))
        fastest = min(fastest, seconds)
        return seconds

    return sample


def timed_once(call: Callable[[], object]) -> Callable[[], float]:
    """Returns a function that makes one call and returns its seconds: for a call of seconds, without warm-up."""

    def sample() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample


def interleave(contenders: Sequence[Contender], *, repeat: int, time_budget: float) -> dict[str, list[float]]:
    """Measures contenders in turn.

    Args:
        contenders: With distinct names.
        repeat: Rounds at most.
        time_budget: Seconds after which no further round is started, once there are three.

    Returns:
        For each name its samples, one for each round that the contender took part in.
    """
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    begin = time.perf_counter()
    for index in range(repeat):
        if index >= _MIN_ROUNDS and time.perf_counter() - begin > time_budget:
            break
        for contender in contenders:
            if contender.rounds is not None and index >= contender.rounds:
                continue
            contender.prepare()
            time.sleep(_SETTLE_SECONDS)
            samples[contender.name].append(contender.measure())
    return samples


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Returns the median over rounds of the ratio within the round."""
    return median(over / under for over, under in zip(numerator, denominator, strict=True))
