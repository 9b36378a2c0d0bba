"""The gated delta product: a state that decays once for each token, and is corrected by several keys.

Source: DeltaProduct, Siems et al. 2025.
"""

from __future__ import annotations

from typing import Any

from .gates import strengths
from .namespace import contiguous, namespace_of
from .recurrent import recurrent, refuse

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def chunk_gated_delta_product(
    q: Any,
    k: Any,
    v: Any,
    g: Any | None,
    beta: Any,
    num_householder: int,
    scale: float | None = None,
    initial_state: Any | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    cp_context: Any | None = None,
) -> tuple[Any, Any | None]:
    """Computes the gated delta rule with `n` keys for each token; see `subquad.ops.recurrent`.

    `R = exp(g_t) S_{t-1}`, then `R = R + beta_i k_i (v_i - R^T k_i)^T` for each of the keys `i` of the token, `S_t = R`,
    `o_t = scale * S_t^T q_t`.

    Args:
        q: queries, `[B, T, H, K]`.
        k: keys, `[B, T * n, H, K]`, those of a token one after the other; of length 1 or less unless they are normalised here.
        v: values, `[B, T * n, H, V]`.
        g: log decays, `[B, T, H]`, or `None`.
        beta: how strongly is written, `[B, T * n, H]`. `None`: 1.
        num_householder: `n`.
        scale: factor of the outputs.
        initial_state: `[N, H, K, V]`.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to divide `q` and `k` by their lengths, `sqrt(sum(x ** 2) + 1e-6)`.
        cu_seqlens: where packed sequences start, `[N + 1]`; counts tokens, not keys.
        cu_seqlens_cpu: no effect.
        cp_context: must be `None`.

    Returns:
        The outputs, `[B, T, H, V]`, and the final state or `None`.
    """
    del cu_seqlens_cpu
    refuse(cp_context=cp_context)
    n = num_householder
    if n < 1:
        raise ValueError(f"num_householder: expected 1 or more, got {n}")
    # Of the outputs of a token, the one after the last key is kept.
    queries = _repeated("q", q, n)
    o, final_state = recurrent(
        queries,
        k,
        v,
        delta=True,
        g=None if g is None else _repeated("g", g, n, only_first=True),
        beta=strengths(beta),
        scale=scale,
        initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=None if cu_seqlens is None else _starts_of_keys(cu_seqlens, q, n),
        output_final_state=output_final_state,
    )
    if n > 1:
        # Without the others, which a view would keep in memory.
        o = contiguous(o[:, n - 1 :: n])
    return o, final_state


def _repeated(name: str, x: Any, n: int, *, only_first: bool = False) -> Any:
    """Returns `[B, T, ...]` with each token `n` times, `[B, T * n, ...]`; with `only_first` all but the first are zeros."""
    namespace = namespace_of(name, x)
    if n == 1:
        return x
    batch, tokens, *rest = x.shape
    other = namespace.zeros_like(x) if only_first else x
    return namespace.stack([x, *[other] * (n - 1)], 2).reshape((batch, tokens * n, *rest))


def _starts_of_keys(cu_seqlens: Any, q: Any, n: int) -> Any:
    """Returns where the keys of packed sequences start."""
    namespace_of("cu_seqlens", cu_seqlens)
    last = cu_seqlens[-1].item() if cu_seqlens.ndim == 1 and len(cu_seqlens) > 0 else q.shape[1]
    if last != q.shape[1]:
        # Said of tokens here, as the extension would say it of keys.
        expected = f"a last element of {q.shape[1]}, the number of tokens"
        raise ValueError(f"cu_seqlens: expected {expected}, got {last}")
    return cu_seqlens * n
