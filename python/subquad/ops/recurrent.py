"""What all recurrent operators share: the call of the engine, and what is refused.

The engine keeps a state `S`, `[K, V]` for each head, that fades, is written to, and is read by every token::

    S_t = diag(exp(g_t)) S_{t-1} + k_t u_t^T
    o_t = scale * S_t^T q_t

The operators differ in `g` and in what `u` is; each is named as in flash-linear-attention (Yang and Zhang 2024), with its order
and meaning of arguments. All forms of an operator (`chunk_*`, `fused_recurrent_*`, `parallel_*`) compute the same: they differ in
speed only. Arrays are PyTorch tensors, NumPy arrays or others that speak DLPack, of one library:

* float32, float64, float16 or bfloat16; gates, `beta` and states may be float32 beside the half types;
* `q` and `k` are `[B, T, H, K]`, `v` is `[B, T, HV, V]`, with `HV` a multiple of `H` where an operator says so: value head `h` reads
  head `h // (HV / H)`; `K` and `V` are 1 to 1024; any strides with a contiguous last axis;
* with `cu_seqlens`, int32 or int64 `[N + 1]`, `B` is 1 and sequence `n` has the tokens `cu_seqlens[n]` to `cu_seqlens[n + 1] - 1`;
  otherwise `N` is `B`; sequences may be empty;
* `initial_state` is `[N, HV, K, V]` (`[N, HV, V, K]` with `state_v_first`), zeros if it is `None`; the final state is returned
  likewise, float32 (float64 for float64 inputs), with `output_final_state`, else `None`.

All of them raise:

* `ValueError` for shapes that do not fit, gates above 0, sequences that do not start at 0, decrease, or do not end at `T`;
* `TypeError` for dtypes that are not supported or differ, objects that are no arrays, mixed libraries, unknown keywords;
* `NotImplementedError` for heads wider than 1024, and for tensors that require gradients.
"""

from __future__ import annotations

from typing import Any

from .. import _native

# Keywords of flash-linear-attention that say how a GPU should work, and change no result.
_WITHOUT_EFFECT = frozenset({"cu_seqlens_cpu", "chunk_indices", "disable_recompute", "safe_gate", "checkpoint_level"})


def recurrent(
    q: Any, k: Any, v: Any, *, output_final_state: bool, unknown: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any | None]:
    """Calls the engine.

    Args:
        q: queries.
        k: keys.
        v: values.
        output_final_state: whether to return the state after the last token.
        unknown: keywords of the caller that its signature does not name.
        **options: what is not `None` of the options of the extension.

    Returns:
        The outputs, and the final state or `None`.
    """
    for name, given in (unknown or {}).items():
        if name == "head_first" and not given:
            continue
        if name == "chunk_size":
            options.setdefault("chunk_size", given)
        elif name not in _WITHOUT_EFFECT:
            raise TypeError(f"{name}: expected no such argument, got {type(given).__name__}")
    return _native.recurrent(q, k, v, options, output_final_state)
