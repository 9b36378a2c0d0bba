"""The benchmarks that `subquad bench` knows: one row and one module each.

A module provides `plan(settings) -> list[(shape, dtype)]` and `run(cases, settings, progress) -> Outcome`.
"""

from typing import NamedTuple


class Bench(NamedTuple):
    """A benchmark: its name, what it measures in a few words, and its module."""

    name: str
    summary: str
    module: str


_ROWS = (
    Bench(
        "exact", "prefill of exact attention, share of the peak and ratio to torch", "subquad.cli.bench.exact"
    ),
    Bench(
        "decode",
        "few queries and a long cache, share of the read bandwidth and ratio to torch",
        "subquad.cli.bench.decode",
    ),
    Bench(
        "masks",
        "masks, modifiers of scores and several lengths, beside plain calls of as much work",
        "subquad.cli.bench.masks",
    ),
    Bench(
        "backward",
        "forward and backward, share of the peak, ratio to torch, and memory",
        "subquad.cli.bench.backward",
    ),
    Bench(
        "recurrent",
        "linear attention, delta rules, state spaces, beside transformers' fallbacks",
        "subquad.cli.bench.recurrent",
    ),
    Bench("latency", "overhead of the smallest call", "subquad.cli.bench.latency"),
    Bench("memory", "memory beyond inputs and outputs of a long call", "subquad.cli.bench.memory"),
)
BENCHES = {row.name: row for row in _ROWS}
