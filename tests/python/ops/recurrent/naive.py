"""The definition of the engine in PyTorch, token by token, for autograd to differentiate."""

from typing import Any

import torch


def by_value_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns `[B, T, H, K]` with a head for each value head."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
    gates: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    delta: bool = False,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the outputs and the state after the last token; `gates` broadcasts to `[B, T, HV, K]`."""
    heads = v.shape[2]
    q, k = by_value_head(q, heads), by_value_head(k, heads)
    rows: list[Any] = []
    for t in range(q.shape[1]):
        before = state
        faded = state if gates is None else state * gates[:, t].exp().unsqueeze(-1)
        written = v[:, t]
        if delta:
            written = written - torch.einsum("bhkv,bhk->bhv", faded, k[:, t])
        if beta is not None:
            written = written * beta[:, t].unsqueeze(-1)
        state = faded + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        if a is not None and b is not None:
            read = torch.einsum("bhkv,bhk->bhv", before, by_value_head(a, heads)[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", by_value_head(b, heads)[:, t], read)
        seen = state
        if bonus is not None:
            of_heads = bonus.repeat_interleave(heads // bonus.shape[0], dim=0)
            seen = before + torch.einsum("bhk,bhv->bhkv", of_heads * k[:, t], written)
        rows.append(scale * torch.einsum("bhkv,bhk->bhv", seen, q[:, t]))
    return torch.stack(rows, 1), state
