"""Mamba-2's state space duality.

Source: Transformers are SSMs, Dao and Gu 2024.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import inf
from typing import Any

from .elementwise import silu
from .inputs import Inputs, check_chunk_size
from .namespace import add_product, cast, dtype_name, zeros
from .recurrent import recurrent
from .sequences import spans_of
from .step_sizes import spelled_out

# The signature is mamba_ssm's.
# ruff: noqa: FBT001, FBT002

# What the engine's arguments are here.
_NAMES = {
    "q": "C",
    "k": "B",
    "v": "x",
    "g": "dt * A",
    "beta": "dt",
    "initial_state": "initial_states",
    "step_rates": "A",
    "step_bias": "dt_bias",
    "step_limits": "dt_limit",
}


def mamba_chunk_scan_combined(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any | None = None,
    z: Any | None = None,
    dt_bias: Any | None = None,
    initial_states: Any | None = None,
    seq_idx: Any | None = None,
    cu_seqlens: Any | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: Any | None = None,
) -> Any | tuple[Any, ...]:
    """Computes `S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T`, `y_t = S_t C_t + D x_t`; see `subquad.ops.recurrent`.

    With `z`, outputs are `y * silu(z)`. Half types are computed in float32 where there is a `D` or a `z`.

    Args:
        x: `[B, T, H, P]`.
        dt: step sizes, `[B, T, H]`.
        A: 0 or below, `[H]`.
        B: `[B, T, G, N]`, `G` a divisor of `H`: each group serves `H / G` consecutive heads.
        C: `[B, T, G, N]`.
        chunk_size: no effect.
        D: `[H]` or `[H, P]`. `None`: 0.
        z: gate, `[B, T, H, P]`, or `None`.
        dt_bias: added to `dt`, `[H]`. `None`: 0.
        initial_states: `S` before the first token, `[B, H, P, N]`, with `cu_seqlens` one for each sequence. `None`: 0.
        seq_idx: the number of the sequence of each token, integers, `[B, T]`: the state is 0 again where it changes. Before the
            first token it is 0, so that `initial_states` belong to sequence 0. With `cu_seqlens`, sequences may be divided further,
            and begin with their `initial_states` whatever `seq_idx` says.
        cu_seqlens: where packed sequences start, `[N + 1]`; they are apart with or without `seq_idx`.
        dt_softplus: whether softplus is taken of `dt` and its bias.
        dt_limit: what it is clipped to after that.
        return_final_states: whether to return `S` after the last token, `[B, H, P, N]`.
        return_varlen_states: whether to return `S` after the last token of each packed sequence, `[N, H, P, N]`.
        state_dtype: of the states that are returned. Default: float32, float64 for float64 inputs.

    Returns:
        The outputs, `[B, T, H, P]`, followed by the states that are asked for, in the order of the arguments.

    Raises:
        ValueError: for `return_varlen_states` without `cu_seqlens`, beside what all operators refuse.
    """
    check_chunk_size(chunk_size)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states: expected False, as cu_seqlens is None, got True")
    given = Inputs("x", x, "B, T, H, P")
    batch, tokens, heads, width = x.shape
    keys = given.alike("B", B, batch, tokens, "G", "N")
    queries = given.alike("C", C, *keys.shape)
    rates = given.parameter("A", A, heads)
    steps = given.parameter("dt", dt, batch, tokens, heads)
    bias = None if dt_bias is None else given.parameter("dt_bias", dt_bias, heads)
    skip = None if D is None else _skip(given, D, heads, width)
    gate = None if z is None else given.parameter("z", z, batch, tokens, heads, width)
    if skip is not None or gate is not None:
        x, keys, queries = (cast(y, given.sums) for y in (x, keys, queries))

    spans = spans_of(cu_seqlens, given, tokens)
    sequences, initial = batch if spans is None else len(spans), initial_states
    if initial is not None:
        initial = given.beside("initial_states", initial, sequences, heads, width, keys.shape[3])
    arrays = [queries, keys, x, steps]
    pieces = None if seq_idx is None else _Pieces(given, seq_idx, spans)
    if pieces is not None:
        arrays = [y.reshape((1, batch * tokens, *y.shape[2:])) for y in arrays]
        initial = None if initial is None else pieces.first_states(initial)
    queries, keys, values, steps = arrays
    making = {
        "beta": steps,
        "step_rates": rates,
        "step_bias": bias,
        "step_softplus": dt_softplus,
        "step_limits": tuple(dt_limit),
    }
    if dt_limit[0] < 0:
        # Gates may be above 0, which the engine finds out of gates alone.
        making = spelled_out(making)
    y, states = recurrent(
        queries,
        keys,
        values,
        **making,
        scale=1.0,
        initial_state=initial,
        state_v_first=True,
        cu_seqlens=cu_seqlens if pieces is None else pieces.starts,
        output_final_state=return_final_states or return_varlen_states,
        names=_NAMES,
    )
    y = y.reshape((batch, tokens, heads, width))
    if skip is not None:
        y = add_product(y, skip, x)
    if gate is not None:
        y = y * silu(gate)
    y = cast(y, given.first.dtype)
    if states is None:
        return y
    if pieces is not None:
        states = pieces.last_states(states)
    if state_dtype is not None:
        states = cast(states, state_dtype)
    # Of a row of packed sequences, the last one's is the state after the last token.
    final = states if cu_seqlens is None else states[-1:]
    return (y, *([final] if return_final_states else []), *([states] if return_varlen_states else []))


def _skip(given: Inputs, D: Any, heads: int, width: int) -> Any:
    """Returns the factor of the inputs, `[H, P]` or `[H, 1]`."""
    if getattr(D, "ndim", 1) == 1:
        return given.parameter("D", D, heads)[:, None]
    return given.parameter("D", D, heads, width)


class _Pieces:
    """Rows or packed sequences, cut where the number of the sequence changes.

    Attributes:
        starts: where pieces start among all tokens, and where the last one ends, `[pieces + 1]`.
    """

    def __init__(self, given: Inputs, seq_idx: Any, spans: list[tuple[int, int]] | None) -> None:
        batch, tokens = given.first.shape[:2]
        given.check("seq_idx", seq_idx, batch, tokens)
        if "int" not in dtype_name(seq_idx):
            raise TypeError(f"seq_idx: expected integers, got {dtype_name(seq_idx)}")
        xp, numbers = given.xp, seq_idx.reshape((batch * tokens,))
        is_packed = spans is not None
        if spans is None:
            spans = [(row * tokens, (row + 1) * tokens) for row in range(batch)]
        changes = (1 + xp.where(numbers[1:] != numbers[:-1])[0]).tolist()
        starts: list[int] = []
        # Whose state each piece begins with, if not with zeros, and the last piece of each sequence.
        owners: list[int | None] = []
        last: list[int] = []
        for n, (first, end) in enumerate(spans):
            inner = changes[bisect_right(changes, first) : bisect_left(changes, end)]
            # What precedes a row is sequence 0.
            is_kept = is_packed or first == end or int(numbers[first]) == 0
            starts += [first, *inner]
            owners += [n if is_kept else None, *[None] * len(inner)]
            last.append(len(starts) - 1)
        self.starts = xp.asarray([*starts, batch * tokens], dtype=xp.int64)
        # Zeros come after all states.
        self._owners = xp.asarray([len(spans) if n is None else n for n in owners], dtype=xp.int64)
        self._last = xp.asarray(last, dtype=xp.int64)
        self._xp = xp

    def first_states(self, states: Any) -> Any:
        """Returns the states that pieces begin with, of those of sequences."""
        nothing = zeros(states, (1, *states.shape[1:]), states.dtype)
        return self._xp.concatenate([states, nothing], 0)[self._owners]

    def last_states(self, states: Any) -> Any:
        """Returns the states that sequences end with, of those of pieces."""
        return states[self._last]
