"""The contenders: subquad, torch's SDPA, and the probe of the machine's peak."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

import subquad
from subquad import _native, masks
from subquad.cli.bench.shapes import Shape, WindowedShape
from subquad.cli.bench.tensors import Inputs, in_library
from subquad.cli.bench.timing import Contender, timed, timed_once

# The probe reports the best of its time. The median of a few is neither a lucky moment of the clock nor one
# in which another process had the core.
_PROBE_SECONDS = 0.01
_PROBES = 3
# The unit that a dtype's products run on: float16 is widened to float32.
_PEAK_KINDS = {"float32": "f32", "float16": "f32", "float64": "f64", "bfloat16": "bf16"}


def set_threads(count: int, *, use_torch: bool) -> None:
    """Sets the thread count of subquad and, if it takes part, of torch."""
    subquad.set_num_threads(count)
    if use_torch:
        import torch

        torch.set_num_threads(count)


def peak_kind(dtype: str) -> str:
    """Returns the kind of peak that a dtype is held against: `"f32"`, `"f64"` or `"bf16"`.

    bfloat16 is held against the float32 peak where the level has no bfloat16 dot product.
    """
    kind = _PEAK_KINDS[dtype]
    if kind == "bf16":
        try:
            _native.probe_peak(kind, None, 0.001, 1)
        except ValueError:
            return "f32"
    return kind


def peak(kind: str, threads: int, *, use_torch: bool) -> Contender:
    """Returns the probe of the machine's peak, in flops per second."""
    return Contender(
        f"peak/{threads}",
        lambda: median(_native.probe_peak(kind, None, _PROBE_SECONDS, threads) for _ in range(_PROBES)),
        lambda: set_threads(threads, use_torch=use_torch),
    )


def read(arrays: Sequence[Any], threads: int, *, use_torch: bool) -> Contender:
    """Returns the probe of reading, a plain sum over the memory of `arrays`, in bytes per second.

    It reads the memory that the others read: how fast that is depends on where it lies.
    """
    return Contender(
        f"read/{threads}",
        lambda: median(_native.probe_read(list(arrays), threads) for _ in range(_PROBES)),
        lambda: set_threads(threads, use_torch=use_torch),
    )


def ours_call(shape: Shape, inputs: Inputs) -> Callable[[], Any]:
    """Returns a call of `subquad.attention` that allocates its output."""
    q, k, v = inputs
    options = {
        name: in_library(value, q) if isinstance(value, np.ndarray) else value
        for name, value in shape.options().items()
    }
    return lambda: subquad.attention(q, k, v, **options)


def window_mask(shape: WindowedShape, like: Any) -> Any:
    """Returns the window of a shape as torch takes it: which keys are seen, of all pairs, `[Sq, Sk]`."""
    seen = masks.sliding_window(shape.window).dense(1, shape.queries, shape.keys)[0]
    return in_library(np.array(seen), like)


def sdpa_arguments(
    shape: Shape, inputs: Inputs, mask: Any | None = None
) -> tuple[Inputs, dict[str, Any]] | None:
    """Returns the tensors and the options of a call of SDPA.

    The tensors are contiguous in torch's order `[B, H, S, D]`. `None` for what torch cannot do without a mask,
    causal with unequal lengths: its `is_causal` aligns top-left.

    Args:
        shape: What to compute.
        inputs: From what.
        mask: A tensor that says which keys are seen, broadcastable to `[B, H, Sq, Sk]`, in the place of
            `shape.causal`.
    """
    if mask is None and shape.causal and shape.queries != shape.keys:
        return None
    options = {
        "attn_mask": mask,
        "is_causal": shape.causal and mask is None,
        "enable_gqa": shape.heads != shape.kv_heads,
    }
    return Inputs(*(tensor.transpose(1, 2).contiguous() for tensor in inputs)), options


def sdpa_calls(
    shape: Shape, inputs: Inputs, mask: Any | None = None
) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """Returns a call of our SDPA and one of torch's, on the same values; arguments as of `sdpa_arguments`."""
    arguments = sdpa_arguments(shape, inputs, mask)
    if arguments is None:
        return None
    from torch.nn import functional

    (q, k, v), options = arguments

    def bind(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(q, k, v, **options)

    return bind(subquad.scaled_dot_product_attention), bind(functional.scaled_dot_product_attention)


def attention(
    name: str, call: Callable[[], Any], threads: int, *, use_torch: bool, is_slow: bool = False
) -> Contender:
    """Returns a contender that times `call`, in seconds; one that is slow in a single call of the first round."""
    return Contender(
        f"{name}/{threads}",
        timed_once(call) if is_slow else timed(call),
        lambda: set_threads(threads, use_torch=use_torch),
        rounds=1 if is_slow else None,
    )
