"""GateLoop: linear attention whose state fades and turns, by a complex number for each step and channel of the keys.

Source: GateLoop, Katsch 2023.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .inputs import Inputs
from .namespace import cast, dtype_name, zeros
from .recurrent import recurrent
from .sequences import by_sequence, last_of, spans_of

# The signatures are in the manner of flash-linear-attention, which has no such operator.
# ruff: noqa: FBT001, FBT002

# How far above 1 the length of a number lies that was rounded from one of length 1.
_ROUNDED = 1e-6


def chunk_gate_loop(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    scale: float = 1.0,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = scale * Re(S_t)^T q_t`; see `subquad.ops.recurrent`.

    Decays are numbers here, not their logarithms. Phases are summed in float64, and half types are computed in float32.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        a: decays, complex64 or complex128, `[B, T, H, K]`, of absolute value 1 or below.
        scale: factor of the outputs.
        initial_state: complex64 or complex128, `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state, complex64, complex128 for float64 inputs, or `None`.
    """
    given = Inputs("q", q, "B, T, H, K")
    xp = given.xp
    batch, tokens, heads, width = q.shape
    k = given.alike("k", k, batch, tokens, heads, width)
    v = given.alike("v", v, batch, tokens, heads, "V")
    a = _complex(given, "a", a, batch, tokens, heads, width)
    spans = spans_of(cu_seqlens, given, tokens)
    sequences = batch if spans is None else len(spans)
    if initial_state is not None:
        initial_state = _complex(given, "initial_state", initial_state, sequences, heads, width, v.shape[3])
        initial_state = cast(xp.concatenate([xp.real(initial_state), xp.imag(initial_state)], 2), given.sums)

    # The state turned back by all phases so far fades without turning; keys enter it turned back, queries as they read it.
    phases = by_sequence(spans, partial(xp.cumsum, axis=1), xp.angle(a))
    turns = cast(xp.concatenate([xp.cos(phases), -xp.sin(phases)], -1), given.sums)
    q, k = (xp.concatenate([x, x], -1) * turns for x in (cast(q, given.sums), cast(k, given.sums)))
    fading = cast(_log_lengths(given, a), given.sums)
    o, final = recurrent(
        q,
        k,
        cast(v, given.sums),
        gk=xp.concatenate([fading, fading], -1),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
        names={"gk": "log |a|"},
    )
    if final is not None:
        last = last_of(spans, phases, zeros(q, (sequences, heads, width), xp.float64))
        final = _turned(given, final, last)
    return cast(o, given.first.dtype), final


def fused_recurrent_gate_loop(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    scale: float = 1.0,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    cu_seqlens: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_gate_loop` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        a: `[B, T, H, K]`.
        scale: see there.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        cu_seqlens: `[N + 1]`.
        **kwargs: see there.

    Returns:
        See there.
    """
    return chunk_gate_loop(q, k, v, a, scale, initial_state, output_final_state, cu_seqlens, **kwargs)


def _complex(given: Inputs, name: str, array: Any, *shape: int | str) -> Any:
    """Returns a complex array as complex128, after the checks of `Inputs`."""
    given.check(name, array, *shape)
    if dtype_name(array) not in {"complex64", "complex128"}:
        raise TypeError(f"{name}: expected dtype complex64 or complex128, got {dtype_name(array)}")
    return cast(array, given.xp.complex128)


def _log_lengths(given: Inputs, a: Any) -> Any:
    """Returns the logarithms of absolute values; what is 1 but for rounding is 1."""
    xp, length = given.xp, abs(a)
    is_zero = length == 0
    # The logarithm of 0 is not asked for: it has a warning, and no gradient.
    found = xp.log(xp.where(is_zero, xp.ones_like(length), length))
    found = xp.where(found > _ROUNDED, found, xp.clip(found, None, 0.0))
    return xp.where(is_zero, xp.full_like(found, float("-inf")), found)


def _turned(given: Inputs, state: Any, phases: Any) -> Any:
    """Returns a state of real and imaginary parts, `[N, H, 2 * K, V]`, turned by phases, `[N, H, K]`, as complex numbers."""
    xp, width = given.xp, phases.shape[2]
    cos, sin = (cast(f(phases), given.sums)[..., None] for f in (xp.cos, xp.sin))
    real, imaginary = state[:, :, :width], state[:, :, width:]
    found = (cos * real - sin * imaginary) + 1j * (sin * real + cos * imaginary)
    return cast(found, xp.complex128 if given.sums == xp.float64 else xp.complex64)
