"""Methods in which transformers' layers compute recurrences themselves, and subquad's operators in their place.

Unlike the functions of `subquad.hf.fallbacks`, they exist once each, and are replaced on the modules of a patched model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from subquad import ops
from subquad.hf.recurrent_arguments import beside, parameter_names, rows, why_refused, wide
from subquad.hf.trials import same_results, sines

# The parameters are named as transformers names them.
# ruff: noqa: FBT001


@dataclass(frozen=True)
class Method:
    """A method that subquad has an operator for.

    Attributes:
        name: What it is called.
        signatures: The names of its parameters, apart from `self` and `**kwargs`, in one version of transformers and another.
        operator: The operator, of `subquad.ops`.
        compute: Computes a call, from the module and the arguments by name: what the method returns, or the reason why it has to
            compute the call itself.
        example: Gives small arguments by name, for a trial with a module.
    """

    name: str
    signatures: tuple[tuple[str, ...], ...]
    operator: str
    compute: Callable[..., Any]
    example: Callable[[Any], Mapping[str, Any]]

    def parameters(self, cls: type) -> tuple[str, ...] | None:
        """Returns the names of the parameters in a class, apart from `self` and `**kwargs`."""
        names = parameter_names(getattr(cls, self.name))
        return None if names is None else names[1:]

    def describes(self, module: torch.nn.Module) -> bool:
        """Whether the method of a module computes what is known here, which is tried out."""
        if self.parameters(type(module)) not in self.signatures:
            return False
        try:
            with torch.no_grad():
                given = self.example(module)
                expected = getattr(type(module), self.name)(module, **given)
                return same_results(self.compute(module, **given), expected)
        # Whatever it raises, it is not the method known here.
        except Exception:
            return False


def _lightning(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor] | str:
    """Computes MiniMax's lightning attention: `S_t = exp(-slope) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`."""
    del position_embeddings, kwargs
    cache = past_key_values if cache is None else cache
    state = None if cache is None else cache.get_linear_cache(module.layer_idx)
    reason = why_refused({}, hidden_states, module.qkv_proj.weight, state)
    if attention_mask is not None and attention_mask.shape[1] != hidden_states.shape[1]:
        # Older versions hand on the mask of all tokens so far, and read the first ones.
        attention_mask = None if bool(attention_mask.all()) else attention_mask
        reason = reason if attention_mask is None else reason or "a mask of other tokens"
    if reason is not None:
        return reason
    projected = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        projected = (projected * attention_mask[:, :, None]).to(projected.dtype)
    heads = projected.unflatten(2, (module.num_attention_heads, -1))
    query, key, value = heads.split(module.head_dim, dim=3)
    final: torch.Tensor
    output, final = ops.chunk_simple_gla(  # type: ignore[assignment] # there is a final state, as it is asked for
        query,
        key,
        value,
        g_gamma=beside(-module.slope_rate.flatten(), query.dtype),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    output = module.norm(output.flatten(2))
    output = module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * output)
    final = final.to(value.dtype)
    if cache is not None:
        cache.set_linear_cache(module.layer_idx, final)
    return output, final


def _lightning_example(module: Any) -> dict[str, Any]:
    weight = module.qkv_proj.weight
    states = sines(2, 3, weight.shape[1], like=weight)
    return {"hidden_states": states, "position_embeddings": None, "attention_mask": None}


def _mlstm(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    c_initial: torch.Tensor | None = None,
    n_initial: torch.Tensor | None = None,
    m_initial: torch.Tensor | None = None,
    return_last_states: bool | None = None,
    mode: str | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | str:
    """Computes xLSTM's matrix memory."""
    del return_last_states
    if "inference" not in (mode or module.config.mode):
        return "modes of training"
    reason = why_refused({}, query, key, value, igate, fgate, c_initial, n_initial, m_initial)
    if reason is not None:
        return reason
    query, key, value, igate, fgate = (rows(one) for one in (query, key, value, igate, fgate))
    hidden, states = ops.mlstm_chunkwise(
        query,
        key,
        value,
        igate,
        fgate,
        c_initial,
        n_initial,
        m_initial,
        return_last_states=True,
        eps=module.config.eps,
    )
    dtype = getattr(torch, module.config.inference_state_dtype)
    return hidden, tuple(one.to(dtype) for one in states)


def _mlstm_example(module: Any) -> dict[str, Any]:
    del module
    like = torch.zeros(())
    shapes = [(2, 2, 3, 4)] * 3 + [(2, 2, 3)] * 2
    inputs = {name: sines(*shape, like=like) for name, shape in zip(_MLSTM, shapes, strict=True)}
    return {**inputs, "mode": "inference"}


def _rg_lru(
    module: Any,
    hidden_states: torch.Tensor,
    recurrent_gate: torch.Tensor,
    reset: torch.Tensor,
    recurrent_states: torch.Tensor | None = None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor] | str:
    """Computes RecurrentGemma's recurrence, `h_t = a_t h_{t-1} + x_t`, with `a_t` 0 where a document begins."""
    del module
    reason = why_refused({}, hidden_states, recurrent_gate, recurrent_states)
    if reason is None and hidden_states.shape[1] == 1:
        reason = "single tokens"
    if reason is not None:
        return reason
    dtype = wide(hidden_states.dtype)
    # A gate of 0 would have no gradient but NaN.
    gates = recurrent_gate.to(dtype).clamp(min=torch.finfo(dtype).tiny).log()
    final: Any
    output, final = ops.fused_recurrent_hgrn(
        hidden_states,
        gates.masked_fill(reset, float("-inf")),
        initial_state=None if recurrent_states is None else recurrent_states.to(dtype),
        output_final_state=True,
    )
    return output, final.to(acc_dtype)


def _rg_lru_example(module: Any) -> dict[str, Any]:
    del module
    states = sines(2, 3, 4, like=torch.zeros(()))
    reset = torch.zeros(2, 3, 1, dtype=torch.bool)
    reset[:, 1] = True
    return {
        "hidden_states": states,
        "recurrent_gate": states.square(),
        "reset": reset,
        "recurrent_states": states[:, 0],
    }


_MLSTM = ("query", "key", "value", "igate", "fgate")

_LIGHTNING = ("hidden_states", "position_embeddings", "attention_mask")

# By the name of the class.
METHODS = {
    "MiniMaxLightningAttention": Method(
        "forward",
        (
            (*_LIGHTNING, "cache"),
            (*_LIGHTNING, "past_key_values"),
            (*_LIGHTNING, "past_key_values", "cache_position"),
        ),
        "chunk_simple_gla",
        _lightning,
        _lightning_example,
    ),
    "RecurrentGemmaRglru": Method(
        "_rnn_scan",
        (("hidden_states", "recurrent_gate", "reset", "recurrent_states", "acc_dtype"),),
        "fused_recurrent_hgrn",
        _rg_lru,
        _rg_lru_example,
    ),
    "xLSTMBackend": Method(
        "forward",
        ((*_MLSTM, "c_initial", "n_initial", "m_initial", "return_last_states", "mode"),),
        "mlstm_chunkwise",
        _mlstm,
        _mlstm_example,
    ),
}
