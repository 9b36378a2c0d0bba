"""What knows where a token stands in its sequence: rotary embeddings and the shift by a token, with FLA's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .norms import widened

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the sequence of each token and its place in it, both `[T]`.

    Args:
        cu_seqlens: where packed sequences start, `[N + 1]`.
        tokens: `T`.

    Raises:
        ValueError: the sequences do not start at 0, decrease, or do not end at `T`.
    """
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    if bounds.numel() < 1 or bounds[0] != 0 or bounds[-1] != tokens or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens: expected bounds that rise from 0 to {tokens}, got {bounds.tolist()}")
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return sequence, torch.arange(tokens) - bounds[:-1][sequence]


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Any | None = None,
) -> Tensor:
    """Rotates pairs of the first `R` channels of each head by the angles of its token's position.

    Args:
        x: `[B, T, H, D]`.
        cos: of positions 0 to `P - 1`, `[P, R / 2]`. Tokens at other positions stay as they are.
        sin: as `cos`.
        interleaved: whether pairs are neighbours instead of lying `R / 2` apart.
        inplace: whether the result is written to `x`.
        seqlen_offsets: is added to the places of tokens in their sequences; a number, or one for each, `[N]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        chunk_indices: no effect.

    Returns:
        As `x`.
    """
    del chunk_indices
    tokens, rotated = x.shape[1], 2 * cos.shape[-1]
    if cu_seqlens is None:
        sequence, place = torch.arange(x.shape[0])[:, None], torch.arange(tokens)[None, :]
    else:
        sequence, place = (index[None, :] for index in places(cu_seqlens, tokens))
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets.long()[sequence]
    position = place + seqlen_offsets
    inside = ((position >= 0) & (position < cos.shape[0]))[..., None, None]
    position = position.clamp(0, max(cos.shape[0] - 1, 0))
    c = torch.where(inside, widened(cos)[position][..., None, :], 1.0)
    s = torch.where(inside, widened(sin)[position][..., None, :], 0.0)
    pairs = widened(x[..., :rotated])
    pairs = pairs.reshape(*x.shape[:-1], *((rotated // 2, 2) if interleaved else (2, rotated // 2)))
    axis = -1 if interleaved else -2
    first, second = pairs.unbind(axis)
    turned = torch.stack((first * c - second * s, first * s + second * c), axis).flatten(-2)
    out = torch.cat((turned.to(x.dtype), x[..., rotated:]), -1)
    return x.copy_(out) if inplace else out


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Any | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes the previous token minus the token.

    Args:
        x: `[B, T, D]`.
        cu_seqlens: where packed sequences start, `[N + 1]`.
        cache: what is before the first token of each sequence, `[N, D]`; `None`: zeros.
        output_cache: whether to return the last token of each sequence.
        chunk_indices: no effect.

    Returns:
        As `x`, and with `output_cache` the last tokens, `[N, D]`: those of `cache` where a sequence is empty.
    """
    del chunk_indices
    batch, tokens, width = x.shape
    rows = x.reshape(batch * tokens, width)
    if cu_seqlens is None:
        bounds = torch.arange(batch + 1) * tokens
    else:
        places(cu_seqlens, batch * tokens)
        bounds = cu_seqlens.long()
    start, end = bounds[:-1], bounds[1:]
    before = x.new_zeros(len(start), width) if cache is None else cache.reshape(len(start), width).to(x.dtype)
    full = end > start
    previous = torch.cat((rows[:1], rows[:-1])).index_copy(0, start[full], before[full])
    shifted = (previous - rows).view(x.shape)
    if not output_cache:
        return shifted
    last = before.index_copy(0, full.nonzero().flatten(), rows[end[full] - 1])
    return shifted, last
