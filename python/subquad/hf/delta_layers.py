"""How transformers' layers of gated delta rules and of KDA are made: what `subquad.hf.whole_layers` has to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import softplus

PARAMETERS = ("hidden_states", "cache", "attention_mask")
_NORM_OPERATOR = "rms_norm_gated"


@dataclass
class Projected:
    """What a layer makes of its inputs before the recurrence, `[B, T, ...]`.

    Attributes:
        mixed: Queries, keys and values of all heads, one after the other, `[B, T, D]`.
        z: Gates of the outputs, of as many elements as these: `[B, T, ...]` or `[B * T, ...]`.
        b: What the strength of writing is a sigmoid of, `[B, T, HV]`.
        g: Log decays, `[B, T, HV]` or `[B, T, HV, K]`.
    """

    mixed: torch.Tensor
    z: torch.Tensor
    b: torch.Tensor
    g: torch.Tensor


@dataclass(frozen=True)
class Kind:
    """How layers are made.

    Attributes:
        children: The names of modules that such a layer has, beside `conv1d`.
        norm: The gated norm's.
        output: The last projection's.
        chunk: The operator for several tokens, of `subquad.ops`.
        step: The operator for one.
        project: Computes what comes before the recurrence.
        key_heads: Heads of queries and keys, and their width.
        value_heads: Heads of values, and their width.
    """

    children: tuple[str, ...]
    norm: str
    output: str
    chunk: str
    step: str
    project: Callable[[Any, torch.Tensor], Projected]
    key_heads: Callable[[Any], tuple[int, int]]
    value_heads: Callable[[Any], tuple[int, int]]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of `forward`."""
        return PARAMETERS

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators that compute calls, of several tokens and of single ones."""
        return (*self.calls(single=False), *self.calls(single=True))

    def calls(self, *, single: bool) -> tuple[str, ...]:
        """Returns the operators that compute one call."""
        if single:
            return ("causal_conv1d_update", self.step, _NORM_OPERATOR)
        return ("causal_conv1d_fn", self.chunk, _NORM_OPERATOR)

    def has_parts(self, module: torch.nn.Module) -> bool:
        """Whether a module has these children."""
        names = {*self.children, self.norm, self.output, "conv1d"}
        return names == {name for name, _ in module.named_children()}


def _decay(module: Any, a: torch.Tensor) -> torch.Tensor:
    decay: torch.Tensor = -module.A_log.float().exp() * softplus(a.float() + module.dt_bias)
    return decay


def _project_by_heads(module: Any, hidden_states: torch.Tensor) -> Projected:
    """Projects as Qwen3-Next does: each key head has its query, key, values, gates and numbers together."""
    keys, values = module.head_k_dim, module.head_v_dim
    groups, per_group = module.num_k_heads, module.num_v_heads // module.num_k_heads
    batch, tokens = hidden_states.shape[:2]
    heads = module.in_proj_qkvz(hidden_states).view(batch, tokens, groups, -1)
    numbers = module.in_proj_ba(hidden_states).view(batch, tokens, groups, -1)
    mixed = heads.new_empty(batch, tokens, module.conv_dim)
    widths = [keys, keys, per_group * values]
    *sources, z = torch.split(heads, [*widths, per_group * values], -1)
    for part, source in zip(torch.split(mixed, [groups * one for one in widths], -1), sources, strict=True):
        part.view(batch, tokens, groups, -1).copy_(source)
    b, a = torch.split(numbers, per_group, -1)
    # Value heads lie apart from each other by more than their width, but for those of one key head.
    z = z.view(batch * tokens, groups, per_group, values)
    return Projected(mixed, z, b.flatten(2), _decay(module, a.flatten(2)))


def _project_joined(module: Any, hidden_states: torch.Tensor) -> Projected:
    """Projects as Qwen3.5 does: queries, keys and values together."""
    z = module.in_proj_z(hidden_states).view(*hidden_states.shape[:2], -1, module.head_v_dim)
    a, b = module.in_proj_a(hidden_states), module.in_proj_b(hidden_states)
    return Projected(module.in_proj_qkv(hidden_states), z, b, _decay(module, a))


def _joined(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    projections = (module.q_proj, module.k_proj, module.v_proj)
    return torch.cat([projection(hidden_states) for projection in projections], -1)


def _project_apart(module: Any, hidden_states: torch.Tensor) -> Projected:
    """Projects as OLMo-Hybrid does: all apart."""
    z = module.g_proj(hidden_states).view(*hidden_states.shape[:2], -1, module.head_v_dim)
    a, b = module.a_proj(hidden_states), module.b_proj(hidden_states)
    return Projected(_joined(module, hidden_states), z, b, _decay(module, a))


def _project_channels(module: Any, hidden_states: torch.Tensor) -> Projected:
    """Projects as Kimi-Linear does, whose gates have a module of their own."""
    z = module.g_b_proj(module.g_a_proj(hidden_states)).view(*hidden_states.shape[:2], -1, module.head_dim)
    g = module.forget_gate(hidden_states)
    return Projected(_joined(module, hidden_states), z, module.b_proj(hidden_states), g)


def _project_channels_at_once(module: Any, hidden_states: torch.Tensor) -> Projected:
    """Projects as Bailing-Hybrid does: as Kimi-Linear, but gates of outputs at once."""
    z = module.g_proj(hidden_states).view(*hidden_states.shape[:2], -1, module.head_dim)
    g = module.forget_gate(hidden_states)
    return Projected(_joined(module, hidden_states), z, module.b_proj(hidden_states), g)


def _keys(module: Any) -> tuple[int, int]:
    return module.num_k_heads, module.head_k_dim


def _values(module: Any) -> tuple[int, int]:
    return module.num_v_heads, module.head_v_dim


def _heads(module: Any) -> tuple[int, int]:
    return module.num_heads, module.head_dim


_GATED_DELTA = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
_KDA = ("chunk_kda", "fused_recurrent_kda")
_QKV = ("q_proj", "k_proj", "v_proj")

_KINDS = (
    Kind(
        ("in_proj_qkvz", "in_proj_ba"), "norm", "out_proj", *_GATED_DELTA, _project_by_heads, _keys, _values
    ),
    Kind(
        ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
        *("norm", "out_proj", *_GATED_DELTA),
        *(_project_joined, _keys, _values),
    ),
    Kind(
        (*_QKV, "a_proj", "b_proj", "g_proj"),
        *("o_norm", "o_proj", *_GATED_DELTA),
        *(_project_apart, _keys, _values),
    ),
    Kind(
        (*_QKV, "forget_gate", "b_proj", "g_a_proj", "g_b_proj"),
        *("o_norm", "o_proj", *_KDA),
        *(_project_channels, _heads, _heads),
    ),
    Kind(
        (*_QKV, "forget_gate", "b_proj", "g_proj"),
        *("o_norm", "o_proj", *_KDA),
        *(_project_channels_at_once, _heads, _heads),
    ),
)


def kind_of(module: Any) -> Kind | None:
    """Returns how a layer is made, if one of the ways here is it; whether it also computes that, `why_not_whole` tells."""
    return next((kind for kind in _KINDS if kind.has_parts(module)), None)
