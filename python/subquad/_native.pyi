from typing import Any

__version__: str

def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Any | None = None,
    return_lse: bool = False,
    out: Any | None = None,
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
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def config() -> dict[str, object]: ...
def probe_peak(
    kind: str, level: str | None = None, seconds: float = 0.1, num_threads: int | None = None
) -> float: ...
def probe_read_bandwidth(bytes: int, seconds: float = 0.1, num_threads: int | None = None) -> float: ...
