"""Biases that depend on the distance of query and key alone: arguments for `relative_bias` of `subquad.attention`.

Source: relative position buckets, T5, Raffel et al. 2020.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing import TypeVar

    ArrayT = TypeVar("ArrayT")

__all__ = ["t5_relative_bias"]

Int64 = npt.NDArray[np.int64]


def _t5_buckets(distance: Int64, num_buckets: int, max_distance: int, *, bidirectional: bool) -> Int64:
    """Returns the bucket of each distance `j - p_i`."""
    first = np.zeros_like(distance)
    if bidirectional:
        # One half of the buckets is for the keys after the query.
        num_buckets //= 2
        first, distance = np.where(distance > 0, num_buckets, 0), np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = num_buckets // 2
    # The models were trained with boundaries that were rounded in float32.
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + steps.astype(np.int64), num_buckets - 1)
    return first + np.where(distance < exact, distance, far)


def t5_relative_bias(
    table: ArrayT, seqlen_q: int, seqlen_k: int, *, bidirectional: bool, max_distance: int = 128
) -> ArrayT:
    """Returns T5's relative position bias as one number for each distance, not for each pair.

    The bias of query `i` and key `j` is `table[bucket(j - p_i), h]`, `p_i = i + Sk - Sq`. Half of the buckets (of each direction)
    are for one distance each, the others grow logarithmically up to `max_distance`; what is beyond shares the last one.

    Args:
        table: the learned biases, `[num_buckets, H]`: an array of any library that can be indexed by an integer array
            (`relative_attention_bias.weight` of a model of transformers).
        seqlen_q: `Sq`, from 0.
        seqlen_k: `Sk`, from 0.
        bidirectional: whether keys after the query have buckets of their own (encoders), rather than that of distance 0 (decoders).
        max_distance: the distance from which all share a bucket; above the number of exact buckets.

    Returns:
        `[H, Sq + Sk - 1]` of table's library and dtype (and gradient): what `relative_bias` takes.

    Raises:
        ValueError: for a table that is not of rank 2, too few buckets, or `max_distance` that is too small.
    """
    shape: tuple[int, ...] = tuple(table.shape)  # type: ignore[attr-defined]
    if len(shape) != 2:
        raise ValueError(f"table: expected shape [num_buckets, H], got {shape}")
    if shape[0] < (4 if bidirectional else 2):
        raise ValueError(f"table: expected at least {4 if bidirectional else 2} buckets, got {shape[0]}")
    exact = shape[0] // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(f"max_distance: expected more than the {exact} exact buckets, got {max_distance}")
    for name, length in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        if length < 0:
            raise ValueError(f"{name}: expected an integer from 0, got {length}")
    # Element t stands for j - i = t - (Sq - 1), that is j - p_i = t - (Sk - 1).
    distance = np.arange(max(seqlen_q + seqlen_k - 1, 0)) - (seqlen_k - 1)
    buckets = _t5_buckets(distance, shape[0], max_distance, bidirectional=bidirectional)
    indexed: Any = table
    biases: ArrayT = indexed[buckets].T
    return biases
