"""`scaled_dot_product_attention` in terms of `subquad.attention`, so that both have one derivative.

The leading axes become the batch; a causal mask that starts at the top left becomes a window.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch


class Mapped(NamedTuple):
    """The arguments of `subquad.attention`, and the shape that its result has to get, `[..., H, L, Ev]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]
    shape: tuple[int, ...]


def _leading(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Returns the axes before the heads that tensors broadcast to, at least one."""
    shapes = [tensor.shape[:-3] for tensor in tensors]
    common: tuple[int, ...] = tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    return common or (1,)


def _heads(tensor: torch.Tensor) -> int:
    return tensor.shape[-3] if tensor.ndim > 2 else 1


def _as_batch(tensor: torch.Tensor, leading: tuple[int, ...], heads: int) -> torch.Tensor:
    """Returns `[..., H, L, E]` as `[B, L, H, E]`."""
    rows = tensor.shape[-2:]
    return tensor.expand(*leading, heads, *rows).reshape(prod(leading), heads, *rows).transpose(1, 2)


def _with_heads(tensor: torch.Tensor, heads: int, *, enable_gqa: bool) -> torch.Tensor:
    if enable_gqa:
        return tensor.repeat_interleave(heads // max(_heads(tensor), 1), -3)
    return tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:])


def _bias(
    mask: torch.Tensor | None, leading: tuple[int, ...], scores: tuple[int, int, int]
) -> torch.Tensor | None:
    # With one leading axis, the mask broadcasts as it is.
    if mask is None or mask.ndim <= len(scores) or len(leading) == 1:
        return mask
    return mask.expand(*leading, *mask.shape[-3:]).reshape(prod(leading), *mask.shape[-3:])


def as_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Mapped:
    """Returns the call of `subquad.attention` that computes the same.

    Args:
        query: `[..., H, L, E]`.
        key: `[..., H, S, E]`.
        value: `[..., H, S, Ev]`.
        attn_mask: broadcastable to `[..., H, L, S]`.
        is_causal: whether query `i` sees only keys `j <= i`.
        scale: factor of the scores.
        enable_gqa: whether key and value may have fewer heads than query.

    Raises:
        RuntimeError: for shapes that do not fit; the extension says which.
    """
    rank = max(query.ndim, key.ndim, value.ndim)
    leading = _leading(query, key, value)
    heads = _heads(query) if enable_gqa else max(_heads(query), _heads(key), _heads(value))
    k_heads, v_heads = _heads(key), _heads(value)
    if k_heads != v_heads or (not enable_gqa and k_heads != 1):
        key = _with_heads(key, heads, enable_gqa=enable_gqa)
        value = _with_heads(value, heads, enable_gqa=enable_gqa)
    length, keys = query.shape[-2], key.shape[-2]
    window_size = None
    if is_causal:
        # Keys beyond the last query are seen by none. Positions count from the last key: the first key is `length - keys` later.
        key, value = key[..., :length, :], value[..., :length, :]
        window_size = (None, max(length - keys, 0))
    options = {
        "causal": False,
        "window_size": window_size,
        "mask": None,
        "scale": scale,
        "bias": _bias(attn_mask, leading, (heads, length, keys)),
        "relative_bias": None,
        "softcap": None,
        "alibi_slopes": None,
        "sinks": None,
        "length_scale": None,
        "normalizer": None,
        "dropout_p": 0.0,
        "dropout_seed": None,
    }
    full = (*leading, heads, length, value.shape[-1])
    return Mapped(
        _as_batch(query, leading, heads),
        _as_batch(key, leading, _heads(key)),
        _as_batch(value, leading, _heads(value)),
        options,
        full[len(full) - rank :],
    )
