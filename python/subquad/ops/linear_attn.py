"""Linear attention: a state to which all tokens are added, and that nothing fades.

Source: Transformers are RNNs, Katharopoulos, Vyas, Pappas and Fleuret 2020.
"""

from __future__ import annotations

from typing import Any

from .inputs import Inputs
from .namespace import cast, dtype_name, namespace_of, widened
from .recurrent import recurrent

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002

# What flash-linear-attention adds to the sum that it divides by.
_OFFSET = 1e-10


def chunk_linear_attn(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: Any | tuple[Any, Any] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | tuple[Any, Any] | None]:
    """Computes `S_t = S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    With `normalize`, outputs are divided by `scale * q_t^T z_t + 1e-10`, where `z_t = z_{t-1} + k_t`. That asks for `q` and `k` of
    one sign, as feature maps give; half types are computed in float32 until then.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`.
        v: values, `[B, T, H, V]`.
        scale: factor of the outputs before they are normalised.
        initial_state: `S`, `[N, H, K, V]`; with `normalize` also `(S, z)`, `z` of shape `[N, 1, H, K]`.
        output_final_state: whether to return the final state.
        normalize: whether to divide. False in `fused_recurrent_linear_attn`.
        cu_seqlens: where packed sequences start, `[N + 1]`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state: `S`, with `normalize` `(S, z)`, or `None`.
    """
    return _linear_attn(
        q,
        k,
        v,
        initial_state,
        normalize=normalize,
        scale=scale,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
    )


def fused_chunk_linear_attn(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: Any | tuple[Any, Any] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | tuple[Any, Any] | None]:
    """Computes what `chunk_linear_attn` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]`, or that and `[N, 1, H, K]`.
        output_final_state: see there.
        normalize: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_recurrent_linear_attn(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None = None,
    initial_state: Any | tuple[Any, Any] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | tuple[Any, Any] | None]:
    """Computes what `chunk_linear_attn` does, by default without normalising.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        scale: see there.
        initial_state: `[N, H, K, V]`; with `normalize` also that and `[N, 1, H, K]`.
        output_final_state: see there.
        reverse: whether sequences are read from the last token to the first.
        normalize: see there; False by default.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return _linear_attn(
        q,
        k,
        v,
        initial_state,
        normalize=normalize,
        scale=scale,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
    )


def _linear_attn(
    q: Any,
    k: Any,
    v: Any,
    initial_state: Any | tuple[Any, Any] | None,
    *,
    normalize: bool,
    **options: Any,
) -> tuple[Any, Any | tuple[Any, Any] | None]:
    if not normalize:
        return recurrent(q, k, v, initial_state=initial_state, **options)
    initial, initial_z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    given = Inputs("q", q, "B, T, H, K")
    k = given.alike("k", k, *q.shape)
    v = given.alike("v", v, *q.shape[:2], "HV", "V")
    initial, initial_z = _widened_state(initial, q), _column(initial_z, q)
    dtype = q.dtype
    q, k, v = (cast(x, given.sums) for x in (q, k, v))
    # The sums to divide by are what a value of 1 in all tokens would give.
    ones = given.xp.ones_like(v[..., :1])
    o, final = recurrent(q, k, v, initial_state=initial, **options)
    weights, final_z = recurrent(q, k, ones, initial_state=initial_z, **options)
    o = cast(o / (weights + _OFFSET), dtype)
    if final is None or final_z is None:
        return o, None
    sequences, heads, width, _ = final_z.shape
    return o, (final, final_z.reshape((sequences, 1, heads, width)))


def _widened_state(state: Any | None, q: Any) -> Any | None:
    """Returns a state of the dtype of `q` as sums are kept, and any other as it is: it is of that kind, or refused."""
    if state is None:
        return None
    namespace_of("initial_state", state)
    return widened("initial_state", state) if dtype_name(state) == dtype_name(q) else state


def _column(z: Any | None, q: Any) -> Any | None:
    """Returns the sums of the keys, `[N, 1, H, K]`, as a state of values of width 1, `[N, H, K, 1]`."""
    z = _widened_state(z, q)
    if z is None:
        return None
    if z.ndim != 4 or z.shape[1] != 1:
        raise ValueError(f"initial_state: expected shape (N, 1, H, K) of z, got {tuple(z.shape)}")
    return z.reshape((z.shape[0], z.shape[2], z.shape[3], 1))
