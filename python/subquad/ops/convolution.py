"""Short causal convolutions: each channel has a filter of its own.

For a channel with `W` taps `w`, `y_t = bias + sum_j w_j x_(t - W + 1 + j)`, or `silu` of that. What lies before the first token of
a sequence is its state, the last tokens before it; without one it is 0.

The functions are named, and take their arguments, as in causal_conv1d (Dao and Gu 2023) and flash-linear-attention (Yang and Zhang
2024). Arrays are PyTorch tensors, NumPy arrays or others that speak DLPack, of one library:

* float32, float64, float16 or bfloat16; filters, biases and initial states may be float32 beside half types, and sums always are;
* filters have 1 to 1024 taps, of which 2 to 4 are fastest; the last tap belongs to the current token;
* `[B, D, T]` and `[B, T, D]` may lie in memory either way, with the tokens or the channels contiguous (anything else is copied);
  outputs lie as `x` does;
* `activation` is `None`, "silu" or "swish", which is the same.

`causal_conv1d_fn` and `causal_conv1d` have gradients of all floating-point arguments, through the states as well, and work within
`torch.compile`; second derivatives are not implemented.

All of them raise:

* `ValueError` for shapes that do not fit and activations that are not known;
* `TypeError` for dtypes that are not supported or differ, objects that are no arrays, mixed libraries, unknown keywords;
* `NotImplementedError` for filters of more than 1024 taps, and for second derivatives.
"""

from __future__ import annotations

from typing import Any

from .. import _native
from .pytorch import REFUSALS, calls, calls_at_once, is_tensor, is_watched
from .recurrent import refuse, renamed

# The signatures are those of causal_conv1d and flash-linear-attention.
# ruff: noqa: FBT001, FBT002

_BACKENDS = ("triton", "cuda", "mix")
# What causal_conv1d calls the arguments of the extension.
_NAMES = {"initial_state": "initial_states", "final_state": "final_states_out"}


def causal_conv1d_fn(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    seq_idx: Any | None = None,
    initial_states: Any | None = None,
    return_final_states: bool = False,
    final_states_out: Any | None = None,
    activation: str | None = None,
) -> Any:
    """Computes causal convolutions; see `subquad.ops.convolution`.

    Args:
        x: `[B, D, T]`.
        weight: `[D, W]`.
        bias: `[D]`. `None`: 0.
        seq_idx: the number of the sequence of each token, int32 or int64 `[B, T]`: neighbours with different numbers do not see
            each other, what is before the first token is of sequence 0, and tokens with a negative number have the output 0.
        initial_states: `[B, D, W - 1]`. `None`: 0.
        return_final_states: whether to return the final states.
        final_states_out: where to write them, `[B, D, W - 1]` of the dtype of `x`; not with gradients.
        activation: see there.

    Returns:
        The outputs, `[B, D, T]`; with `return_final_states` also the last `W - 1` tokens of the last sequence of each row with what
        was before them, `[B, D, W - 1]`.
    """
    options = {
        "bias": bias,
        "residual": None,
        "seq_idx": seq_idx,
        "cu_seqlens": None,
        "initial_state": initial_states,
        "final_state": final_states_out,
        "silu": _is_silu(activation),
        "full_state": False,
    }
    try:
        out, final_states = _convolve(
            x, weight, options, tokens_first=False, output_final_state=return_final_states
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(renamed(str(error), _NAMES)) from None
    return (out, final_states) if return_final_states else out


def causal_conv1d(
    x: Any,
    weight: Any | None = None,
    bias: Any | None = None,
    residual: Any | None = None,
    initial_state: Any | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Any | None = None,
    cu_seqlens_cpu: Any | None = None,
    chunk_indices: Any | None = None,
    cp_context: Any | None = None,
    **kwargs: Any,
) -> tuple[Any, Any | None]:
    """Computes causal convolutions; see `subquad.ops.convolution`.

    Args:
        x: `[B, T, D]`, or with more axes that make up `D` together.
        weight: `[D, W]`.
        bias: `[D]`. `None`: 0.
        residual: what is added to the outputs after the activation, as `x`.
        initial_state: `[N, D, W]`, of which the first token is older than any filter reaches. `None`: 0.
        output_final_state: whether to return the final state.
        activation: see there.
        backend: "triton", "cuda" or "mix"; no effect.
        cu_seqlens: where packed sequences start, int32 or int64 `[N + 1]`; `B` is 1. Otherwise `N` is `B`.
        cu_seqlens_cpu: no effect.
        chunk_indices: no effect.
        cp_context: must be `None`.
        **kwargs: may be `seq_idx`, see `causal_conv1d_fn`.

    Returns:
        The outputs, as `x`, and the last `W` tokens of each sequence with what was before them, `[N, D, W]`, or `None`.
    """
    del cu_seqlens_cpu, chunk_indices
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected 'triton', 'cuda' or 'mix', got {backend!r}")
    refuse(cp_context=cp_context)
    for name, given in kwargs.items():
        if name != "seq_idx":
            raise TypeError(f"{name}: expected no such argument, got {type(given).__name__}")
    options = {
        "bias": bias,
        "residual": _flat(residual),
        "seq_idx": kwargs.get("seq_idx"),
        "cu_seqlens": cu_seqlens,
        "initial_state": initial_state,
        "final_state": None,
        "silu": _is_silu(activation),
        "full_state": True,
    }
    out, final_state = _convolve(
        _flat(x), weight, options, tokens_first=True, output_final_state=bool(output_final_state)
    )
    return (out.reshape(x.shape) if getattr(x, "ndim", 3) > 3 else out), final_state


def causal_conv1d_update(
    x: Any,
    conv_state: Any,
    weight: Any,
    bias: Any | None = None,
    activation: str | None = None,
    cache_seqlens: Any | None = None,
    conv_state_indices: Any | None = None,
) -> Any:
    """Computes causal convolutions of some more tokens, and moves states on in place; see `subquad.ops.convolution`.

    It has no gradients.

    Args:
        x: `[B, D]`, or `[B, D, T]`.
        conv_state: the tokens before, `[N, D, S]` of the dtype of `x`, `S >= W - 1`, the last one last. It is written to.
        weight: `[D, W]`.
        bias: `[D]`. `None`: 0.
        activation: see there.
        cache_seqlens: how many tokens each sequence has seen, int32 or int64 `[B]`: states are circular, and token `t` lies at
            `t % S`. `None`: states are shifted.
        conv_state_indices: which state each row of `x` continues, int32 or int64 `[B]`, each one at most once; rows with a negative
            one have the output 0 and no state. `None`: `N` is `B`, and each row has its own.

    Returns:
        The outputs, as `x`.
    """
    out = _native.causal_conv1d_update(
        x, conv_state, weight, bias, _is_silu(activation), cache_seqlens, conv_state_indices
    )
    # With the channels last, as they are computed.
    return out.swapaxes(1, 2) if out.ndim == 3 else out


def _is_silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def _flat(x: Any) -> Any:
    """Returns `[B, T, ...]` as `[B, T, D]`."""
    return x.reshape((*x.shape[:2], -1)) if getattr(x, "ndim", 0) > 3 else x


def _lies_the_other_way(x: Any) -> bool:
    """Whether the axis in the middle of three is the one that is contiguous, or the last one has one element."""
    if getattr(x, "ndim", 0) != 3:
        return False
    strides = x.stride() if hasattr(x, "stride") else getattr(x, "strides", None)
    if strides is None:
        return False
    unit = 1 if hasattr(x, "stride") else x.itemsize
    return bool(strides[1] == unit and (strides[2] != unit or x.shape[2] == 1))


def _convolve(
    x: Any, weight: Any, options: dict[str, Any], *, tokens_first: bool, output_final_state: bool
) -> tuple[Any, Any]:
    """Calls the extension, or what stands in for it where PyTorch has to know of the call.

    Args:
        x: `[B, T, D]`, or `[B, D, T]`.
        weight: `[D, W]`.
        options: those of the extension but the order of axes.
        tokens_first: whether `x` and the residual are `[B, T, D]`.
        output_final_state: whether to return the final state.

    Returns:
        The outputs, as `x`, and the final state or `None`.
    """
    swaps = _lies_the_other_way(x)
    if swaps:
        x = x.swapaxes(1, 2)
        residual = options["residual"]
        if getattr(residual, "ndim", 0) == 3:
            options["residual"] = residual.swapaxes(1, 2)
    options["tokens_first"] = tokens_first != swaps
    out, final_state = _called(x, weight, options, output_final_state=output_final_state)
    return (out.swapaxes(1, 2) if swaps else out), final_state


def _called(x: Any, weight: Any, options: dict[str, Any], *, output_final_state: bool) -> tuple[Any, Any]:
    watched = is_watched()
    if not watched:
        try:
            return _native.causal_conv1d(x, weight, options, output_final_state)
        except REFUSALS:
            if not is_tensor(x):
                raise
    compute = calls().causal_conv1d if watched else calls_at_once().causal_conv1d_as_it_is
    found: tuple[Any, Any] = compute(x, weight, options, output_final_state=output_final_state)
    return found
