"""Calls that take turns."""

import pytest

from subquad.cli.bench import turns


@pytest.mark.parametrize(
    ("size", "copies"), [(1, 32), (4 << 20, 32), (32 << 20, 4), (96 << 20, 2), (1 << 30, 1)]
)
def test_copies(size, copies):
    assert turns.copies(size) == copies


def test_each_call_has_its_turn():
    call = turns.in_turn([lambda: 0, lambda: 1, lambda: 2])
    assert [call() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
