"""FlexAttention's block masks as intervals of keys, which is what kernels take.

A block mask lists, for each block of queries, the blocks of keys that are seen whole and those that are seen in part; its
`mask_mod` decides within the latter. It is evaluated once for each of their entries, a row of blocks at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.flex_attention import BlockMask

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


def _chosen(
    counts: torch.Tensor | None, indices: torch.Tensor | None, place: tuple[int, int, int]
) -> list[int]:
    """Returns the blocks of keys that a table lists for one block of queries."""
    if counts is None or indices is None:
        return []
    return [int(block) for block in indices[place][: int(counts[place])]]


def _runs(seen: Bool) -> tuple[Int64, Int64]:
    """Returns the number of runs of each row of `seen`, and all runs, `[n, 2]`, row by row."""
    edges = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    counts = np.bincount(rows, minlength=len(seen)).astype(np.int64)
    return counts, np.stack([starts, ends], axis=1).astype(np.int64)


def intervals(mask: Any, seqlen_q: int, seqlen_k: int) -> tuple[Int64, Int64, int, int]:
    """Returns the keys that each query sees under a block mask.

    Args:
        mask: a `torch.nn.attention.flex_attention.BlockMask` on the CPU. Query `i` is its `q_idx` `i`, whatever the number of
            keys.
        seqlen_q: number of queries.
        seqlen_k: number of keys.

    Returns:
        Where the intervals of each query start, `[B * H * Sq + 1]`; the intervals, `[n, 2]`; `B` and `H` of the mask.

    Raises:
        TypeError: `mask` is no block mask.
        ValueError: it is on another device, or made for other lengths.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask: expected a BlockMask, got {type(mask).__name__}")
    if mask.kv_indices.device.type != "cpu":
        raise ValueError(f"mask: expected a BlockMask on the CPU, got one on {mask.kv_indices.device}")
    if tuple(mask.seq_lengths) != (seqlen_q, seqlen_k):
        raise ValueError(
            f"mask: expected a BlockMask of {seqlen_q} queries and {seqlen_k} keys, got one of {tuple(mask.seq_lengths)}"
        )
    batches, heads = mask.kv_num_blocks.shape[:2]
    q_block, k_block = mask.BLOCK_SIZE
    counts, runs = [np.zeros(1, np.int64)], [np.zeros((0, 2), np.int64)]
    for batch in range(batches):
        for head in range(heads):
            for number, first in enumerate(range(0, seqlen_q, q_block)):
                rows = torch.arange(first, min(first + q_block, seqlen_q))
                seen = np.zeros((len(rows), seqlen_k), dtype=bool)
                place = (batch, head, number)
                for block in _chosen(mask.full_kv_num_blocks, mask.full_kv_indices, place):
                    seen[:, block * k_block : (block + 1) * k_block] = True
                for block in _chosen(mask.kv_num_blocks, mask.kv_indices, place):
                    keys = torch.arange(block * k_block, min((block + 1) * k_block, seqlen_k))
                    seen[:, keys[0] : keys[-1] + 1] = _evaluate(mask.mask_mod, batch, head, rows, keys)
                found, added = _runs(seen)
                counts.append(found)
                runs.append(added)
    return np.cumsum(np.concatenate(counts)), np.concatenate(runs), batches, heads


def _evaluate(mask_mod: Any, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> Bool:
    """Returns `mask_mod` at every pair of a query and a key; it may only be written for single ones."""
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_rows = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    found: Bool = over_rows(torch.tensor(batch), torch.tensor(head), rows, keys).numpy()
    return found
