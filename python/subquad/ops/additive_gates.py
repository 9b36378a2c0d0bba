"""Gates of weighted averages: each token has a weight, and what came before fades by as much as it gains.

Sources: ABC, Peng et al. 2022; LightNet, Qin et al. 2024.
"""

from __future__ import annotations

from typing import Any

from .elementwise import exp, running_logsumexp
from .inputs import Inputs
from .namespace import cast, namespace_of, zeros
from .sequences import by_sequence, last_of, spans_of

_NOTHING = float("-inf")


def fused_additive_gate(
    x: Any,
    initial_state: Any | None = None,
    cu_seqlens: Any | None = None,
    output_dtype: Any | None = None,
    gate_dtype: Any | None = None,
) -> tuple[Any, Any, Any]:
    """Computes the weights and log decays of averages with the weights `exp(x)`; sums are kept in float64.

    With `z_t = log(exp(z_{t-1}) + exp(x_t))`, the weight of token `t` is `exp(x_t - z_t)`, and the log decay `z_{t-1} - z_t`, 0
    where nothing came before.

    Args:
        x: logarithms of weights, `[B, T, H, K]`; `B` is 1 with `cu_seqlens`.
        initial_state: `z` before the first token, `[N, 1, H, K]`; `-inf` is nothing, and so is `None`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        output_dtype: of the weights, one of the library of `x`. Default: that of `x`.
        gate_dtype: of the log decays, likewise.

    Returns:
        The weights and the log decays, as `x`, and `z` after the last token, `[N, 1, H, K]`, float32 (float64 for float64 inputs).

    Raises:
        ValueError: for shapes that do not fit, and sequences that do not start at 0, decrease, or do not end at `T`.
        TypeError: for dtypes that are not supported, objects that are no arrays, and mixed libraries.
    """
    given = Inputs("x", x, "B, T, H, K")
    spans = spans_of(cu_seqlens, given, x.shape[1])
    before = sums_before(given, initial_state, spans, *x.shape[2:])
    weights, gates, last = averages(given, x, spans, before)
    weights = cast(weights, x.dtype if output_dtype is None else output_dtype)
    return weights, cast(gates, x.dtype if gate_dtype is None else gate_dtype), last


def sums_before(
    given: Inputs, z: Any | None, spans: list[tuple[int, int]] | None, heads: int, width: int
) -> Any | None:
    """Returns `z` before the first token, `[N, 1, H, K]`, after the checks of `Inputs`; `None` as it is."""
    sequences = given.first.shape[0] if spans is None else len(spans)
    return None if z is None else given.beside("initial_state", z, sequences, 1, heads, width)


def averages(
    given: Inputs, x: Any, spans: list[tuple[int, int]] | None, before: Any | None = None
) -> tuple[Any, Any, Any]:
    """Returns what `fused_additive_gate` does; weights and log decays have the dtype of sums.

    Args:
        given: the arrays of the call.
        x: logarithms of weights, `[B, T, H, K]`.
        spans: see `spans_of`.
        before: `z` before the first token, `[N, 1, H, K]`, or `None`: nothing.
    """
    xp, batch = given.xp, x.shape[0]
    # In float64: both are differences of sums over all tokens.
    x = cast(x, xp.float64)
    if before is None:
        sequences = batch if spans is None else len(spans)
        before = zeros(x, (sequences, 1, *x.shape[2:]), xp.float64) + _NOTHING
        z = by_sequence(spans, running_logsumexp, x)
    else:
        before = cast(before, xp.float64)
        z = by_sequence(spans, _sums, x, of_sequences=(before,))
    gates = by_sequence(spans, _steps_down, z, of_sequences=(before,))
    last = last_of(spans, z, before[:, 0])[:, None]
    return cast(exp(x - z), given.sums), cast(gates, given.sums), cast(last, given.sums)


def _sums(x: Any, before: Any) -> Any:
    """Returns `z` of each token."""
    return namespace_of("x", x).logaddexp(running_logsumexp(x), before)


def _steps_down(z: Any, before: Any) -> Any:
    """Returns how much lower `z` is before each token, 0 where nothing is before and where that rounds to above 0."""
    xp = namespace_of("z", z)
    first = z[:, :1]
    first = xp.where(before == _NOTHING, first, before) if z.shape[1] else first
    return xp.clip(xp.concatenate([first, z[:, :-1]], 1) - z, None, 0.0)
