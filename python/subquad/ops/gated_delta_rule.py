"""The gated delta rule: a state that decays as a whole before what it returns for a key moves towards the value.

Source: Gated Delta Networks, Yang, Kautz and Hatamizadeh 2024.
"""

from __future__ import annotations

from typing import Any

from .gates import fused_gdn_gate, strengths
from .namespace import widened
from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    chunk_indices: Any | None = None,
    cp_context: Any | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Any | None = None,
    dt_bias: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes `R_t = exp(g_t) S_{t-1}`, `S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T`, `o_t = scale * S_t^T q_t`.

    See `subquad.ops.recurrent`. `HV` may be a multiple of `H`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T, H, K]`, of length 1 or less unless they are normalised here.
        v: values, `[B, T, HV, V]`.
        g: log decays, `[B, T, HV]`. `None`: no decay.
        beta: how strongly is written, `[B, T, HV]`. `None`: 1.
        scale: factor of the outputs.
        initial_state: `[N, HV, K, V]`.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to divide `q` and `k` by their lengths, `sqrt(sum(x ** 2) + 1e-6)`.
        use_beta_sigmoid_in_kernel: whether `sigmoid(beta)` is in the place of `beta`.
        allow_neg_eigval: whether that sigmoid is doubled.
        state_v_first: whether states are `[N, HV, V, K]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cu_seqlens_cpu: no effect.
        chunk_indices: no effect.
        cp_context: must be `None`.
        use_gate_in_kernel: whether `fused_gdn_gate(g, A_log, dt_bias)` is in the place of `g`.
        A_log: `[HV]`; no effect without `use_gate_in_kernel`.
        dt_bias: `[HV]`; no effect without `use_gate_in_kernel`.
        **kwargs: see `subquad.ops.recurrent`.

    Returns:
        The outputs, `[B, T, HV, V]`, and the final state or `None`.
    """
    del cu_seqlens_cpu, chunk_indices
    refuse(cp_context=cp_context)
    return recurrent(
        q,
        k,
        v,
        delta=True,
        g=_gates(g, A_log, dt_bias) if use_gate_in_kernel else g,
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
    )


def fused_recurrent_gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None = None,
    gk: Any | None = None,
    gv: Any | None = None,
    beta: Any | None = None,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Any | None = None,
    dt_bias: Any | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Any | None = None,
    *,
    inplace_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes what `chunk_gated_delta_rule` does.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`.
        g: `[B, T, HV]`.
        gk: log decays of the channels of the keys, `[B, T, HV, K]`; multiplies with that of `g`.
        gv: must be `None`.
        beta: `[B, T, HV]`.
        scale: see there, also for arguments that are not explained.
        initial_state: `[N, HV, K, V]`.
        output_final_state: see there.
        use_qk_l2norm_in_kernel: see there.
        use_gate_in_kernel: see there.
        A_log: `[HV]`.
        dt_bias: `[HV]`.
        use_beta_sigmoid_in_kernel: see there.
        allow_neg_eigval: see there.
        state_v_first: whether states are `[N, HV, V, K]`.
        cu_seqlens: `[N + 1]`.
        inplace_final_state: whether the final state is written to `initial_state`, which is returned: float32 (float64 for float64
            inputs) and contiguous.
        **kwargs: see there.

    Returns:
        See there.
    """
    refuse(gv=gv)
    if use_gate_in_kernel:
        g = _gates(g, A_log, dt_bias)
    if g is not None and gk is not None:
        g, gk = None, _sum(g, gk)
    return recurrent(
        q,
        k,
        v,
        delta=True,
        g=g,
        gk=gk,
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
    )


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def _gates(g: Any | None, A_log: Any | None, dt_bias: Any | None) -> Any:
    for name, given in (("g", g), ("A_log", A_log)):
        if given is None:
            raise ValueError(f"{name}: expected an array, as use_gate_in_kernel is set, got None")
    return fused_gdn_gate(g, A_log, dt_bias)


def _sum(g: Any, gk: Any) -> Any:
    """Returns the logarithms of products of decays, `[B, T, HV, K]`."""
    steps, channels = widened("g", g), widened("gk", gk)
    if tuple(steps.shape) != tuple(channels.shape[:-1]):
        raise ValueError(f"g: expected shape {tuple(channels.shape[:-1])}, got {tuple(steps.shape)}")
    return channels + steps[..., None]
