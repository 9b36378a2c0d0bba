"""Which weights are dropped: numbers of Philox 4x32-10 (Salmon et al. 2011), counted by the place of query and key."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = np.uint64(0xFFFFFFFF)


def philox(counters: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Returns four 32-bit numbers for each counter.

    Args:
        counters: four 32-bit words of each, `[4, ...]`.
        seed: 64 bits.
    """
    a, b, c, d = counters
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = np.uint64(_MULTIPLIERS[0]) * a, np.uint64(_MULTIPLIERS[1]) * c
        a, c = (
            (second >> np.uint64(32)) ^ b ^ np.uint64(key[0]),
            (first >> np.uint64(32)) ^ d ^ np.uint64(key[1]),
        )
        b, d = second & _WORD, first & _WORD
        key = [(word + increment) & 0xFFFFFFFF for word, increment in zip(key, _INCREMENTS, strict=True)]
    return np.stack([a, b, c, d])


def dropout_factors(
    shape: tuple[int, int, int, int], dropout_p: float, dropout_seed: int
) -> npt.NDArray[np.float64]:
    """Returns what weights are multiplied by: 0 with the probability `dropout_p`, else `1 / (1 - dropout_p)`.

    Keys `4 c` to `4 c + 3` take the four numbers of the counter `(c, query, head, sequence)`; those below `dropout_p * 2**32` drop.

    Args:
        shape: `[B, H, Sq, Sk]`.
        dropout_p: from 0 to below 1.
        dropout_seed: 64 bits.
    """
    batch, heads, queries, keys = shape
    blocks = -(-keys // 4)
    places = np.meshgrid(*map(np.arange, (batch, heads, queries, blocks)), indexing="ij")
    counters = np.stack([places[3], places[2], places[1], places[0]]).astype(np.uint64)
    numbers = np.moveaxis(philox(counters, dropout_seed), 0, -1).reshape(batch, heads, queries, 4 * blocks)
    dropped = numbers[..., :keys] < np.uint64(dropout_p * 2**32)
    return np.where(dropped, 0.0, 1 / (1 - dropout_p))
