"""Calls that take turns on copies of what they read, so that none finds its own in the processor's caches.

What is read again and again would stay there, which what a decoder keeps does not, with the weights read in between.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

# As many copies as reach this together, and do not fit the last-level cache.
_WORKING_SET = 128 << 20
_MAX_COPIES = 32


def copies(size: int) -> int:
    """Returns how many copies of so many bytes calls should take turns on."""
    return min(-(-_WORKING_SET // size), _MAX_COPIES)


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Returns a call that is the next one of `calls` each time."""
    turn = cycle(calls)

    def call() -> Any:
        return next(turn)()

    return call
