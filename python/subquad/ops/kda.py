"""Kimi Delta Attention: the gated delta rule with a gate for each channel of the keys.

Source: Kimi Linear, Kimi Team 2025.
"""

from __future__ import annotations

from typing import Any

from .gates import fused_kda_gate, strengths
from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_kda(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    cp_context: Any | None = None,
    *,
    A_log: Any | None = None,
    dt_bias: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `R_t = diag(exp(g_t)) S_{t-1}`, `S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T`, `o_t = scale * S_t^T q_t`.

    See `subquad.ops.recurrent`. `HV` may be a multiple of `H`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`, of length 1 or less unless they are normalised here.
        v: values, `[B, T, HV, V]`.
        g: log decays, `[B, T, HV, K]`.
        beta: how strongly is written, `[B, T, HV]`. `None`: 1.
        scale: factor of the outputs.
        initial_state: `[N, HV, K, V]`.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to divide `q` and `k` by their lengths, `sqrt(sum(x ** 2) + 1e-6)`.
        use_gate_in_kernel: whether `fused_kda_gate(g, A_log, dt_bias, lower_bound)` is in the place of `g`.
        use_beta_sigmoid_in_kernel: whether `sigmoid(beta)` is in the place of `beta`.
        allow_neg_eigval: whether that sigmoid is doubled.
        safe_gate: no effect: all gates are safe.
        lower_bound: of the gates that are computed here; no effect without `use_gate_in_kernel`.
        disable_recompute: no effect.
        return_intermediate_states: must be False.
        state_v_first: whether states are `[N, HV, V, K]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        cp_context: must be `None`.
        A_log: `[HV]`; no effect without `use_gate_in_kernel`.
        dt_bias: `[HV * K]`; no effect without `use_gate_in_kernel`.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, HV, V]`, and the final state or `None`.
    """
    del safe_gate, disable_recompute, cu_seqlens_cpu
    refuse(return_intermediate_states=return_intermediate_states, cp_context=cp_context)
    return recurrent(
        q,
        k,
        v,
        delta=True,
        gk=fused_kda_gate(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g,
        beta=strengths(
            beta, use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval
        ),
        scale=scale,
        initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
        unknown=kwargs,
        names={"gk": "g"},
    )


def fused_recurrent_kda(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    A_log: Any | None = None,
    dt_bias: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    *,
    inplace_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_kda` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV, K]`.
        beta: `[B, T, HV]`.
        A_log: `[HV]`.
        dt_bias: `[HV * K]`.
        scale: see there, also for arguments that are not explained.
        initial_state: `[N, HV, K, V]`.
        output_final_state: see there.
        use_qk_l2norm_in_kernel: see there.
        use_gate_in_kernel: see there.
        use_beta_sigmoid_in_kernel: see there.
        allow_neg_eigval: see there.
        lower_bound: see there.
        state_v_first: whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`.
        inplace_final_state: whether the final state is written to `initial_state`, which is returned: float32 (float64 for float64
            inputs) and contiguous.
        **kwargs: see there.

    Returns:
        See there.
    """
    return recurrent(
        q,
        k,
        v,
        delta=True,
        gk=fused_kda_gate(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g,
        beta=strengths(
            beta, use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval
        ),
        scale=scale,
        initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        inplace_final_state=inplace_final_state,
        output_final_state=output_final_state,
        unknown=kwargs,
        names={"gk": "g"},
    )
