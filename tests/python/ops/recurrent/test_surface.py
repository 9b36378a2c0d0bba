"""Signatures, those of flash-linear-attention, mamba_ssm and mlstm_kernels, and what is imported when."""

import inspect

import pytest

from subquad import ops

# Arguments by position, with their defaults.
SIGNATURES = {
    "chunk_delta_rule": (
        "q, k, v, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None"
    ),
    "chunk_dplr_delta_rule": (
        "q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, "
        "lower_bound=None"
    ),
    "chunk_gate_loop": "q, k, v, a, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None",
    "chunk_gated_delta_product": (
        "q, k, v, g, beta, num_householder, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None"
    ),
    "chunk_gated_delta_rule": (
        "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None"
    ),
    "chunk_gla": (
        "q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, "
        "cu_seqlens=None, cu_seqlens_cpu=None"
    ),
    "chunk_gsa": (
        "q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, checkpoint_level=2, "
        "cu_seqlens=None, cu_seqlens_cpu=None"
    ),
    "chunk_hgrn": "x, g, initial_state=None, output_final_state=False",
    "chunk_iplr_delta_rule": (
        "q, k, v, a, b, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None"
    ),
    "chunk_kda": (
        "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, "
        "allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False, "
        "return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, "
        "cp_context=None"
    ),
    "chunk_lightning_attn": (
        "q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, "
        "cu_seqlens=None"
    ),
    "chunk_linear_attn": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, cu_seqlens=None"
    ),
    "chunk_retention": "q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None",
    "chunk_rwkv6": (
        "r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None"
    ),
    "chunk_rwkv7": (
        "r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, "
        "cu_seqlens_cpu=None, safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, "
        "lower_bound=None"
    ),
    "chunk_simple_gla": (
        "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None"
    ),
    "fused_chunk_linear_attn": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, cu_seqlens=None"
    ),
    "fused_chunk_retention": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None"
    ),
    "fused_chunk_simple_gla": (
        "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, "
        "cu_seqlens=None"
    ),
    "fused_gdn_gate": "g, A_log, dt_bias=None, output_dtype=None",
    "fused_kda_gate": "g, A_log=None, dt_bias=None, lower_bound=None, output_dtype=None",
    "fused_recurrent_delta_rule": (
        "q, k, v, beta=None, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, cu_seqlens=None"
    ),
    "fused_recurrent_dplr_delta_rule": (
        "q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "cu_seqlens=None"
    ),
    "fused_recurrent_gate_loop": (
        "q, k, v, a, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None"
    ),
    "fused_recurrent_gated_delta_rule": (
        "q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, "
        "dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, "
        "cu_seqlens=None"
    ),
    "fused_recurrent_gla": (
        "q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False, "
        "reverse=False, state_v_first=False, cu_seqlens=None"
    ),
    "fused_recurrent_gsa": (
        "q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "cu_seqlens=None"
    ),
    "fused_recurrent_hgrn": "x, g, initial_state=None, output_final_state=False, cu_seqlens=None",
    "fused_recurrent_iplr_delta_rule": (
        "q, k, v, a, b, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None"
    ),
    "fused_recurrent_kda": (
        "q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, state_v_first=False, "
        "cu_seqlens=None"
    ),
    "fused_recurrent_lightning_attn": (
        "q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, "
        "reverse=False, cu_seqlens=None"
    ),
    "fused_recurrent_linear_attn": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "normalize=False, cu_seqlens=None"
    ),
    "fused_recurrent_retention": (
        "q, k, v, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "state_v_first=False, cu_seqlens=None"
    ),
    "fused_recurrent_rwkv6": (
        "r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, reverse=False, "
        "cu_seqlens=None"
    ),
    "fused_recurrent_rwkv7": (
        "r, w, k, v, a, b, scale=None, initial_state=None, output_final_state=True, cu_seqlens=None"
    ),
    "fused_recurrent_simple_gla": (
        "q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, "
        "reverse=False, state_v_first=False, cu_seqlens=None"
    ),
    "mamba_chunk_scan_combined": (
        "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, "
        "cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
        "return_varlen_states=False, state_dtype=None"
    ),
    "mlstm_chunkwise": (
        "q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, return_last_states=False, "
        "eps=1e-06, chunk_size=64, cu_seqlens=None"
    ),
    "mlstm_recurrent": (
        "q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, return_last_states=False, "
        "eps=1e-06, cu_seqlens=None"
    ),
    "mlstm_siging_chunkwise": (
        "q, k, v, i, f, c_initial=None, n_initial=None, return_last_states=False, normalize=False, "
        "chunk_size=64, cu_seqlens=None"
    ),
    "mlstm_siging_recurrent": (
        "q, k, v, i, f, c_initial=None, n_initial=None, return_last_states=False, normalize=False, "
        "cu_seqlens=None"
    ),
    "parallel_delta_rule": "q, k, v, beta, scale=None, output_attentions=False",
    "parallel_retention": "q, k, v, scale=None, output_attentions=False, cu_seqlens=None",
    "parallel_simple_gla": (
        "q, k, v, g=None, scale=None, output_attentions=False, cu_seqlens=None, cu_seqlens_cpu=None"
    ),
    "selective_scan_fn": (
        "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
    ),
    "selective_state_update": (
        "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None"
    ),
}
# What they take by keyword only, beside keywords that change nothing.
KEYWORDS = {
    "chunk_gated_delta_rule": "use_gate_in_kernel=False, A_log=None, dt_bias=None",
    "chunk_kda": "A_log=None, dt_bias=None",
    "fused_recurrent_gated_delta_rule": "inplace_final_state=False",
    "fused_recurrent_kda": "inplace_final_state=False",
    "selective_scan_fn": "initial_state=None",
}
# Their tests are in a file of their own.
CONVOLUTIONS = {"causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update"}
NORMS = {"rms_norm_gated"}


def shown(parameters):
    """Parameters as they are written in a signature."""
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    by_position = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert shown(by_position) == SIGNATURES[name]
    assert shown(p for p in parameters if p.kind is p.KEYWORD_ONLY) == KEYWORDS.get(name, "")


def test_every_signature_is_listed():
    assert {*SIGNATURES, "chunk_gdn", "fused_recurrent_gdn"} | CONVOLUTIONS | NORMS == set(ops.__all__)
    assert sorted(ops.__all__) == ops.__all__
    assert set(ops.__all__) <= set(dir(ops))
    with pytest.raises(AttributeError, match=r"module 'subquad\.ops' has no attribute 'chunk_nothing'"):
        _ = ops.chunk_nothing


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - CONVOLUTIONS - NORMS))
def test_docstrings_name_all_arguments(name):
    function = getattr(ops, name)
    for argument in inspect.signature(function).parameters:
        assert f"        {argument}: " in function.__doc__ or argument == "kwargs", argument
    axes = {"mlstm": "[B, H, T, K]", "mamba": "[B, T, H, P]"}.get(name.partition("_")[0], "[B, ")
    assert axes in function.__doc__ or "gate" in name


def test_operators_are_imported_when_they_are_used(run_python):
    code = """
import sys
import subquad
loaded = lambda: sorted(name for name in sys.modules if name.startswith("subquad.ops."))
before = loaded()
import subquad.ops
print(loaded() == before, "subquad.ops.recurrent" in before)
subquad.ops.chunk_gla
print("subquad.ops.recurrent" in loaded(), "chunk_gla" in vars(subquad.ops))
from subquad.ops import *
print(fused_recurrent_rwkv7.__name__)
print([name for name in ("torch", "transformers", "jax", "ml_dtypes") if name in sys.modules])
"""
    assert run_python(code).splitlines() == ["True False", "True True", "fused_recurrent_rwkv7", "[]"]


def test_operators_work_without_other_libraries(run_python):
    code = """
import sys
import numpy as np
from subquad import ops
x = np.full((1, 3, 2, 4), 0.5, np.float32)
g = np.full((1, 3, 2), -0.5, np.float32)
ops.chunk_linear_attn(x, x, x, output_final_state=True)
ops.chunk_retention(x, x, x)
o, _ = ops.chunk_gated_delta_rule(x, x, x, g, g, use_gate_in_kernel=True, A_log=g[0, 0], use_beta_sigmoid_in_kernel=True)
ops.chunk_gated_delta_product(x[:, :1], x, x, None, -g, 3)
ops.chunk_gsa(x, x, x, x)
ops.chunk_gate_loop(x, x, x, np.exp(1j * x) / 2)
ops.mlstm_chunkwise(x, x, x, g, g)
ops.mamba_chunk_scan_combined(x, -g, g[0, 0], x, x, 64, seq_idx=np.zeros((1, 3), int))
print(o.shape, [name for name in ("torch", "transformers", "jax", "ml_dtypes") if name in sys.modules])
"""
    assert run_python(code) == "(1, 3, 2, 4) []\n"
