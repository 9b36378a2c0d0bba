from typing import Any

__version__: str
SCAN_CHUNK: int

def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window_size: Any | None = None,
    mask: Any | None = None,
    scale: Any | None = None,
    bias: Any | None = None,
    relative_bias: Any | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    sinks: Any | None = None,
    length_scale: Any | None = None,
    normalizer: Any | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any | None = None,
    return_lse: bool = False,
    out: Any | None = None,
) -> Any: ...
def attention_backward(
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    d_lse: Any | None,
    wrt: list[str],
    options: dict[str, Any],
) -> tuple[Any, ...]: ...
def attention_jvp(
    q: Any,
    k: Any,
    v: Any,
    tangents: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Any, Any]: ...
def attention_double_backward(
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    d_lse: Any | None,
    cotangents: dict[str, Any],
    options: dict[str, Any],
    wrt: list[str] | None = None,
) -> dict[str, Any]: ...
def attention_varlen_backward(
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    d_lse: Any | None,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    wrt: list[str],
    softmax_scale: float | None,
    causal: bool,
    window_size: Any | None,
    softcap: float | None,
    alibi_slopes: Any | None,
    sinks: Any | None,
) -> tuple[Any, ...]: ...
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    block_table: Any | None = None,
    sinks: Any | None = None,
    return_lse: bool = False,
) -> Any: ...
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any: ...
def attention_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any | None = None,
    v: Any | None = None,
    rotary_cos: Any | None = None,
    rotary_sin: Any | None = None,
    cache_seqlens: Any | None = None,
    cache_batch_idx: Any | None = None,
    cache_leftpad: Any | None = None,
    block_table: Any | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    rotary_interleaved: bool = True,
    alibi_slopes: Any | None = None,
    num_splits: int | None = None,
    return_softmax_lse: bool = False,
    *,
    sinks: Any | None = None,
) -> Any: ...
def merge_attention(outs: list[Any], lses: list[Any]) -> Any: ...
def recurrent(
    q: Any, k: Any, v: Any, options: dict[str, Any], output_final_state: bool
) -> tuple[Any, Any | None]: ...
def recurrent_and_kept(q: Any, k: Any, v: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]: ...
def recurrent_backward(
    q: Any,
    k: Any,
    v: Any,
    given: tuple[Any, Any | None, Any | None],
    options: dict[str, Any],
    wrt: list[str],
) -> tuple[Any, ...]: ...
def causal_conv1d(
    x: Any, weight: Any, options: dict[str, Any], output_final_state: bool
) -> tuple[Any, Any | None]: ...
def causal_conv1d_backward(
    d_out: Any,
    d_final_state: Any | None,
    x: Any,
    weight: Any,
    wrt: list[str],
    options: dict[str, Any],
) -> tuple[Any, ...]: ...
def causal_conv1d_update(
    x: Any,
    conv_state: Any,
    weight: Any,
    bias: Any | None,
    silu: bool,
    cache_seqlens: Any | None,
    conv_state_indices: Any | None,
) -> Any: ...
def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    options: dict[str, Any],
    return_last_state: bool,
    return_checkpoints: bool,
) -> tuple[Any, Any | None, Any | None]: ...
def selective_scan_backward(
    d_out: Any,
    d_last_state: Any | None,
    checkpoints: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    wrt: list[str],
    options: dict[str, Any],
) -> tuple[Any, ...]: ...
def selective_state_update(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, options: dict[str, Any]
) -> Any: ...
def linear_scan(
    x: Any,
    g: Any,
    initial_state: Any | None,
    cu_seqlens: Any | None,
    log_gates: bool,
    output_final_state: bool,
) -> tuple[Any, Any | None]: ...
def linear_scan_backward(
    d_out: Any,
    d_final_state: Any | None,
    out: Any,
    g: Any,
    initial_state: Any | None,
    cu_seqlens: Any | None,
    log_gates: bool,
    wrt: list[str],
) -> tuple[Any, ...]: ...
def rms_norm_gated(x: Any, g: Any, weight: Any | None, bias: Any | None, silu: bool, eps: float) -> Any: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def config() -> dict[str, object]: ...
def probe_peak(
    kind: str, level: str | None = None, seconds: float = 0.1, num_threads: int | None = None
) -> float: ...
def probe_read(arrays: list[Any], num_threads: int | None = None) -> float: ...
