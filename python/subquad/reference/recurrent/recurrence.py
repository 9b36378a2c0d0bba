"""The loop that every recurrence runs in, one token after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
States = tuple[Array, ...]
Step = Callable[..., tuple[States, Array]]


def outer(k: Array, v: Array) -> Array:
    """Returns `k v^T`, `[..., K, V]`, of `k` `[..., K]` and `v` `[..., V]`."""
    product: Array = k[..., :, None] * v[..., None, :]
    return product


def read(q: Array, state: Array) -> Array:
    """Returns `q^T S`, `[..., V]`, of `q` `[..., K]` and a state `[..., K, V]`."""
    result: Array = np.einsum("...k,...kv->...v", q, state)
    return result


def recur(
    step: Step,
    tokens: Sequence[Array],
    states: States,
    shape: tuple[int, ...],
    *,
    cu_seqlens: Any | None = None,
    reverse: bool = False,
) -> tuple[Float64, States]:
    """Runs a recurrence over sequences.

    Args:
        step: takes the states and what belongs to one token, all `[B, ...]`; returns the next states and the output `[B, *shape]`.
        tokens: what belongs to each token, all `[B, T, ...]`.
        states: the states before the first token, `[N, ...]` for `N` sequences.
        shape: of the output of one token.
        cu_seqlens: where each of `N` packed sequences begins, and where the last one ends, `[N + 1]`; `B` is 1. `None`: each of the
            `B` rows is a sequence.
        reverse: whether sequences are read from the last token to the first.

    Returns:
        The outputs, `[B, T, *shape]`, and the states after all tokens of each sequence, `[N, ...]`. A sequence without tokens keeps
        its states.

    Raises:
        ValueError: for packed sequences in more than one row.
    """
    batch, length = tokens[0].shape[:2]
    if cu_seqlens is None:
        spans = [(slice(None), range(length))]
    elif batch == 1:
        bounds = pairwise(np.asarray(cu_seqlens).tolist())
        spans = [(slice(n, n + 1), range(start, end)) for n, (start, end) in enumerate(bounds)]
    else:
        raise ValueError(f"cu_seqlens needs one row of packed sequences, not {batch}")
    outputs = np.zeros((batch, length, *shape))
    finals = tuple(state.copy() for state in states)
    for rows, span in spans:
        current = tuple(state[rows] for state in states)
        for t in reversed(span) if reverse else span:
            current, outputs[:, t] = step(current, *(x[:, t] for x in tokens))
        for final, state in zip(finals, current, strict=True):
            final[rows] = state
    return outputs, finals


def recur_matrix(
    step: Step,
    tokens: Sequence[Array],
    initial_state: Array | None,
    shape: tuple[int, int, int],
    *,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    reverse: bool = False,
) -> tuple[Float64, Float64]:
    """Runs a recurrence whose state is one matrix for each head.

    Args:
        step: see `recur`.
        tokens: see there.
        initial_state: the state before the first token, `[N, H, K, V]`; `None` is 0.
        shape: `(H, K, V)`.
        state_v_first: whether states are given and returned as `[N, H, V, K]`.
        cu_seqlens: see `recur`.
        reverse: see there.

    Returns:
        The outputs, `[B, T, H, V]`, and the state after the last token, `[N, H, K, V]`.
    """
    if initial_state is not None and state_v_first:
        initial_state = np.swapaxes(initial_state, -1, -2)
    state = first_state(initial_state, shape, tokens[0].shape[0], cu_seqlens)
    o, (final,) = recur(step, tokens, (state,), (shape[0], shape[2]), cu_seqlens=cu_seqlens, reverse=reverse)
    return o, np.swapaxes(final, -1, -2) if state_v_first else final


def first_state(
    initial_state: Array | None,
    shape: tuple[int, ...],
    batch: int,
    cu_seqlens: Any | None,
    dtype: Any = np.float64,
) -> Array:
    """Returns the state before the first token of each sequence, `[N, *shape]`.

    Args:
        initial_state: the state, or `None`: 0.
        shape: of the state of one sequence.
        batch: `B`, the number of sequences without `cu_seqlens`.
        cu_seqlens: see `recur`.
        dtype: of the result.
    """
    if initial_state is not None:
        return initial_state.astype(dtype)
    return np.zeros((batch if cu_seqlens is None else len(cu_seqlens) - 1, *shape), dtype)
