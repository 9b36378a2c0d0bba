"""RWKV-4's linear attention: averages of values with weights that fade by channel.

For a channel with decay `w = exp(time_decay)` and bonus `u = time_first`, over the tokens `i` before `t`::

    o_t = (sum_i e^(k_i - (t - 1 - i) w) v_i + e^(u + k_t) v_t) / (sum_i e^(k_i - (t - 1 - i) w) + e^(u + k_t))

Sums are kept as multiples of `e^m`, where `m_t = max(m_{t-1} - w, k_t)` is the largest exponent in them. As `m_t + t w` is a
running maximum, all exponents of a block are known at once, and both sums are one recurrence, `s_t = e^g s_{t-1} + x_t`, with
`g = m_{t-1} - w - m_t`, 0 or below.
"""

from __future__ import annotations

from typing import Any

import torch

from subquad import ops
from subquad.hf.recurrent_arguments import Running, why_refused

# The parameters are named as transformers names them.
# ruff: noqa: FBT001, FBT002

# Tokens whose exponents are computed at once, in float64: they are differences of `t w`.
_BLOCK = 1024
# The exponent of sums of nothing.
_LOWEST = -1e38

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _block(
    decay: torch.Tensor, bonus: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: State
) -> tuple[torch.Tensor, State]:
    """Returns outputs, `[B, T, D]`, and the state after them, for a block of tokens in float32."""
    sums, weights, largest = state
    steps = torch.arange(key.shape[1] + 1, dtype=torch.float64)[:, None] * decay.double()
    exponents = torch.cat([largest[:, None].double(), key.double()], 1).add_(steps)
    exponents = exponents.cummax(1).values.sub_(steps)
    gates = (exponents[:, :-1] - decay - exponents[:, 1:]).clamp_(max=0).float()
    before, after = exponents[:, :-1].float(), exponents[:, 1:].float()
    written = torch.exp(key - after)
    final: Any
    both, final = ops.fused_recurrent_hgrn(
        torch.cat([written * value, written], 2),
        torch.cat([gates, gates], 2),
        initial_state=torch.cat([sums, weights], 1),
        output_final_state=True,
    )
    past = torch.cat([torch.cat([sums, weights], 1)[:, None], both[:, :-1]], 1)
    past_sums, past_weights = past.chunk(2, 2)
    own = key + bonus
    top = torch.maximum(before, own)
    old, new = torch.exp(before - top), torch.exp(own - top)
    output = (old * past_sums + new * value) / (old * past_weights + new)
    return output, (*final.chunk(2, 1), after[:, -1])


def wkv(
    running: Running,
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: Any = None,
    return_state: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, list[torch.Tensor] | None] | str:
    """Computes a call of `rwkv_linear_attention`.

    Args:
        running: The layer.
        time_decay: `[D]`.
        time_first: `[D]`.
        key: `[B, T, D]`.
        value: `[B, T, D]`.
        state: Sums, weights and exponents before the first token, `[B, D]` each. `None`: nothing.
        return_state: Whether to return the state even if there was none.
        **others: What else the function was called with.

    Returns:
        The outputs, `[B, T, D]`, of the dtype of `key`, and the state, float32; or why the function has to compute the call itself.
    """
    del running
    reason = why_refused(others, key, value, time_decay, time_first, *(state or ()))
    if reason is None and key.shape[1] == 1:
        reason = "single tokens"
    if reason is not None:
        return reason
    decay, bonus = time_decay.float().exp(), time_first.float()
    if state is None:
        nothing = torch.zeros_like(key[:, 0], dtype=torch.float32)
        current = (nothing, nothing, nothing + _LOWEST)
    else:
        sums, weights, largest = (one.float() for one in state)
        current = (sums, weights, largest)
    outputs = []
    for start in range(0, key.shape[1], _BLOCK):
        keys, values = (one[:, start : start + _BLOCK].float() for one in (key, value))
        output, current = _block(decay, bonus, keys, values, current)
        outputs.append(output.to(key.dtype))
    return torch.cat(outputs, 1), list(current) if return_state or state is not None else None
