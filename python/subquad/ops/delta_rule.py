"""The delta rule: what the state returns for a key moves towards the value.

Sources: Linear Transformers Are Secretly Fast Weight Programmers, Schlag et al. 2021; Parallelizing Linear Transformers with the
Delta Rule over Sequence Length, Yang et al. 2024.
"""

from __future__ import annotations

from typing import Any

from .gates import strengths
from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = scale * S_t^T q_t`; see `subquad.ops.recurrent`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`, of length 1 or less unless they are normalised here.
        v: values, `[B, T, H, V]`.
        beta: how strongly is written, `[B, T, H]`. `None`: 1.
        scale: factor of the outputs.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to divide `q` and `k` by their lengths, `sqrt(sum(x ** 2) + 1e-6)`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state or `None`.
    """
    del cu_seqlens_cpu
    return recurrent(
        q,
        k,
        v,
        delta=True,
        beta=strengths(beta),
        scale=scale,
        initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
    )


def fused_recurrent_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_delta_rule` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`.
        scale: see there, also for the arguments that follow.
        initial_state: `[N, H, K, V]`.
        output_final_state: see there.
        use_qk_l2norm_in_kernel: see there.
        cu_seqlens: `[N + 1]`.

    Returns:
        See there.
    """
    return chunk_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def parallel_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    scale: float | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Computes the outputs of `chunk_delta_rule`.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`.
        scale: see there.
        output_attentions: must be False.
        **kwargs: see there.

    Returns:
        The outputs, `[B, T, H, V]`, and `None`.
    """
    refuse(output_attentions=output_attentions)
    o, _ = recurrent(
        q, k, v, delta=True, beta=strengths(beta), scale=scale, output_final_state=False, unknown=kwargs
    )
    return o, None
