"""Short causal convolutions of flash-linear-attention's layers, in PyTorch, with its signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from .norms import widened
from .positions import places

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def _activated(y: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + widened(bias)
    if activation in {"swish", "silu"}:
        y = silu(y)
    elif activation is not None:
        raise ValueError(f"activation: expected 'swish', 'silu' or None, got {activation!r}")
    return y if residual is None else y + widened(residual).reshape(y.shape)


def _filters(weight: Tensor | None) -> Tensor:
    if weight is None or weight.ndim != 2:
        got = "None" if weight is None else f"shape {tuple(weight.shape)}"
        raise ValueError(f"weight: expected shape [D, W], got {got}")
    return widened(weight)


def _first(state: Tensor | None, columns: Tensor, count: int, width: int) -> Tensor:
    """Returns what is before the first token of each sequence, wide.

    A sequence stands behind its state, so that a token and the `width - 1` before it are the `width` columns that end with it.
    """
    channels = columns.shape[1]
    if state is None:
        return columns.new_zeros(count, channels, width)
    if state.shape != (count, channels, width):
        raise ValueError(f"initial_state: expected shape {[count, channels, width]}, got {[*state.shape]}")
    return widened(state)


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Any | None = None,
    chunk_indices: Any | None = None,
    cp_context: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes `activation(sum_i weight[:, W - 1 - i] x_{t - i} + bias) + residual` for each channel.

    Args:
        x: `[B, T, D]`, or `[B, T, ...]` with `D` channels in all.
        weight: `[D, W]`.
        bias: `[D]`.
        residual: as `x`.
        initial_state: the `W` tokens before each sequence, of which the first has no influence, `[N, D, W]`; `None`: zeros.
        output_final_state: whether to return the last `W` tokens.
        activation: `swish`, `silu` or `None`.
        backend: no effect.
        cu_seqlens: where packed sequences start, `[N + 1]`; `B` is 1.
        cu_seqlens_cpu: no effect.
        chunk_indices: no effect.
        cp_context: must be `None`.
        **kwargs: no effect.

    Returns:
        As `x`, and the last tokens of each sequence, `[N, D, W]`, or `None`.

    Raises:
        ValueError: for shapes and activations that do not fit.
        NotImplementedError: for `cp_context`.
    """
    del backend, cu_seqlens_cpu, chunk_indices, kwargs
    if cp_context is not None:
        raise NotImplementedError(
            f"cp_context: {type(cp_context).__name__} is not supported; sequences are not spread over processes"
        )
    filters = _filters(weight)
    channels, width = filters.shape
    batch, tokens = x.shape[:2]
    columns = widened(x).reshape(batch, tokens, channels).transpose(1, 2)
    if cu_seqlens is None:
        extended = torch.cat((_first(initial_state, columns, batch, width), columns), -1)
        y = conv1d(extended, filters[:, None], groups=channels)[..., 1:]
        last = extended[..., tokens:]
    elif batch != 1:
        raise ValueError(f"x: expected one row of packed sequences, got {batch}")
    else:
        sequence, _ = places(cu_seqlens, tokens)
        count = len(cu_seqlens) - 1
        state = _first(initial_state, columns, count, width)
        # Where the columns of states and tokens come to lie.
        of_states = torch.arange(count)[:, None] * width + torch.arange(width)
        before = of_states + cu_seqlens.long()[:-1, None]
        own = torch.arange(tokens) + (sequence + 1) * width
        extended = columns.new_zeros(channels, tokens + count * width)
        extended = extended.index_copy(1, own, columns[0])
        extended = extended.index_copy(1, before.flatten(), state.transpose(0, 1).flatten(1))
        y = conv1d(extended[None], filters[:, None], groups=channels)[..., own - (width - 1)]
        last = extended[:, of_states + cu_seqlens.long()[1:, None]].transpose(0, 1)
    out = _activated(y.transpose(1, 2), bias, activation, residual)
    return out.to(x.dtype).reshape(x.shape), last.to(x.dtype) if output_final_state else None


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `causal_conv1d` for one token of each sequence, which enters `cache` in place.

    Args:
        x: `[N, 1, D]`, `[1, N, D]` or `[N, D]`; the channels may be in several axes.
        cache: the last `W` tokens of each sequence, `[N, D, W]`.
        residual: as `x`.
        weight: `[D, W]`.
        bias: `[D]`.
        activation: `swish`, `silu` or `None`.

    Returns:
        As `x`, and `cache`.

    Raises:
        ValueError: for shapes and activations that do not fit.
    """
    filters = _filters(weight)
    channels, width = filters.shape
    rows = x.reshape(-1, channels)
    if cache.shape != (len(rows), channels, width):
        raise ValueError(f"cache: expected shape {[len(rows), channels, width]}, got {[*cache.shape]}")
    cache.copy_(torch.cat((cache[..., 1:], rows[..., None].to(cache.dtype)), -1))
    window = torch.cat((widened(cache[..., :-1]), widened(rows)[..., None]), -1)
    out = _activated((window * filters).sum(-1), bias, activation, residual)
    return out.to(x.dtype).reshape(x.shape), cache
