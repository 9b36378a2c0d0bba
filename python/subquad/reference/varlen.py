"""Attention over sequences of different lengths by its definition: one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .exact import attention

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    block_table: Array | None = None,
    sinks: Array | None = None,
) -> tuple[Float64, Float64]:
    """`subquad.attention_varlen` in float64.

    Args:
        q: `[total_q, H, D]`.
        k: `[total_k, Hkv, D]`, or `[pages, page_size, Hkv, D]` with `block_table`.
        v: as `k`, of width `Dv`.
        cu_seqlens_q: where the queries of each sequence begin, and where the last ones end, `[B + 1]`.
        cu_seqlens_k: the same of the keys.
        softmax_scale: factor of the scores. Default: `D ** -0.5`.
        causal: whether a query sees only the keys up to its position, its sequence's last query being at its last key.
        window_size: keys that a query sees before and after its position; `None` and negative numbers are unbounded.
        softcap: `c` of `c * tanh(score / c)`, or 0.
        alibi_slopes: `[H]` or `[B, H]`.
        block_table: pages of each sequence, `[B, pages]`.
        sinks: `[H]`.

    Returns:
        `[total_q, H, Dv]` and the log-sum-exp, `[H, total_q]`.
    """
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    lse = np.full((q.shape[1], q.shape[0]), -np.inf)
    left, right = (None if side is None or side < 0 else side for side in window_size)
    for b in range(len(cu_seqlens_q) - 1):
        queries = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        start, end = int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1])
        if block_table is None:
            keys, values = k[start:end], v[start:end]
        else:
            used = block_table[b, : -(-(end - start) // k.shape[1])]
            keys, values = (x[used].reshape(-1, *x.shape[2:])[: end - start] for x in (k, v))
        per_sequence = alibi_slopes is not None and alibi_slopes.ndim == 2
        one, one_lse = attention(
            q[None, queries],
            keys[None],
            values[None],
            scale=softmax_scale,
            causal=causal,
            window_size=(left, right),
            softcap=softcap or None,
            alibi_slopes=alibi_slopes[b] if per_sequence and alibi_slopes is not None else alibi_slopes,
            sinks=sinks,
            return_lse=True,
        )
        out[queries], lse[:, queries] = one[0], one_lse[0]
    return out, lse
