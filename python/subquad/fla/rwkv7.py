"""What flash-linear-attention's RWKV-7 layer computes around its operator, in PyTorch, with its signatures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.recurrent import recurrent, require

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def fused_addcmul_rwkv7(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Computes `hidden_states + delta * x` for each of the six `x`; `None` for a missing one."""
    mixes = (xr, xw, xk, xv, xa, xg)
    return tuple(None if mix is None else hidden_states + delta * mix for mix in mixes)


def fused_k_rwkv7(
    k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: Any | None = None, cu_seqlens_cpu: Any | None = None
) -> Tensor:
    """Computes `k * (1 + (a - 1) * ka)`; the lengths of sequences have no effect."""
    del cu_seqlens, cu_seqlens_cpu
    return k * (1.0 + (a - 1.0) * ka)


def gate_output_correction(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Computes `(o + sum(r * k * r_k) * v) * g`, with a sum for each head.

    Args:
        o: outputs, `[B, T, H * D]`.
        r: receptances, `[B, T, H, D]`.
        k: keys, `[B, T, H, D]`.
        r_k: weights, `[H, D]`.
        v: values, `[B, T, H, D]`.
        g: gates, `[B, T, H * D]`.

    Returns:
        As `o`.
    """
    bonus = (r_k * r * k).sum(-1, keepdim=True)
    return (o + (bonus * v).flatten(-2)) * g


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes `subquad.ops.fused_recurrent_rwkv7` with `-kk` and `kk * a` as the two factors of its low-rank term.

    With `reverse`, sequences are read from the last token to the first.
    """
    require(w=w)
    return recurrent(
        r,
        k,
        v,
        a=-kk,
        b=kk * a,
        gk=w,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        reverse=reverse,
        names={"q": "r", "gk": "w"},
    )
