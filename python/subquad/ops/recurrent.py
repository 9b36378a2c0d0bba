"""What all recurrent operators share: the call of the engine, and what is refused.

The engine keeps a state `S`, `[K, V]` for each head, that fades, is written to, and is read by every token::

    S_t = diag(exp(g_t)) S_{t-1} + k_t u_t^T
    o_t = scale * S_t^T q_t

The operators differ in `g` and in what `u` is; each is named as in flash-linear-attention (Yang and Zhang 2024), with its order
and meaning of arguments. Some are composed of calls of the engine and functions of the array's own library: gated slot attention,
LightNet, GateLoop, the mLSTM (named as in mlstm_kernels), and Mamba-2's scan (as in mamba_ssm). Theirs say where arguments are
others than these. All forms of an operator (`chunk_*`, `fused_chunk_*`, `fused_recurrent_*`, `parallel_*`) compute the same,
chunk by chunk or token by token as the length of the sequences asks for. Arrays are PyTorch tensors, NumPy arrays or others that
speak DLPack, of one library:

* float32, float64, float16 or bfloat16; gates, `beta` and states may be float32 beside the half types, and sums always are;
* `q` and `k` are `[B, T, H, K]`, `v` is `[B, T, HV, V]`, with `HV` a multiple of `H` where an operator says so: value head `h`
  reads head `h // (HV / H)`; `K` and `V` are any with up to 4 million elements of a state, `K V`; any
  strides with a contiguous last axis;
* `g` and what stands in its place are natural logarithms of decays, 0 or below; `-inf` clears the state;
* `scale` is `K ** -0.5` unless an operator says otherwise;
* with `cu_seqlens`, int32 or int64 `[N + 1]`, `B` is 1 and sequence `n` has the tokens `cu_seqlens[n]` to `cu_seqlens[n + 1] - 1`;
  otherwise `N` is `B`; sequences may be empty;
* with `reverse`, where a form has it, each sequence is read from its last token to the first: `initial_state` comes before the
  last token, the final state after the first, and outputs are at their tokens;
* `initial_state` is `[N, HV, K, V]` (`[N, HV, V, K]` with `state_v_first`), zeros if it is `None`; the final state is returned
  likewise, float32 (float64 for float64 inputs), with `output_final_state`, else `None`;
* `**kwargs` may be `chunk_size`, a power of two from 16 on (above 64, chunks have 64 tokens), and `head_first=False`; like
  `cu_seqlens_cpu`, `chunk_indices`, `safe_gate`, `disable_recompute`, `checkpoint_level`, `use_graph` and `max_num_seqs` it changes
  no result.

All of them raise:

* `ValueError` for shapes that do not fit, gates above 0, sequences that do not start at 0, decrease, or do not end at `T`;
* `TypeError` for dtypes that are not supported or differ, objects that are no arrays, mixed libraries, unknown keywords;
* `NotImplementedError` for larger states, `output_attentions`, `cp_context`, `gv`, a `beta` for each column of
  the values, second derivatives and forward-mode derivatives.

PyTorch differentiates them: tensors that require grad get gradients of all rows, gates, `beta` and both states. States before each
chunk are computed again in the backward pass, where memory of `O(T / chunk)` states holds them; rules that read the state (delta
rules, RWKV-7, DPLR, IPLR) keep as much for it as `v` has. `torch.compile` sees `subquad::recurrent`; autocast casts rows, but not
gates and states.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .. import _native
from .namespace import backwards, contiguous, zeros
from .pytorch import REFUSALS, calls, calls_at_once, is_tensor, is_watched
from .step_sizes import spelled_out

# Keywords of flash-linear-attention that say how a GPU should work, and change no result.
_WITHOUT_EFFECT = frozenset(
    {
        "cu_seqlens_cpu",
        "chunk_indices",
        "disable_recompute",
        "safe_gate",
        "checkpoint_level",
        "use_graph",
        "max_num_seqs",
    }
)

_INSTEAD = {
    "output_attentions": "outputs are computed without weights between tokens",
    "cp_context": "sequences are not spread over processes",
    "gv": "states fade by the channels of keys, not by those of values",
    "return_intermediate_states": "ask for the final state of parts of the sequence",
}


# Of the engine, in tokens.
_SMALLEST_CHUNK, _LARGEST_CHUNK = 16, 64

# Of the arguments of the engine, those that have a row for each token, beside queries, keys and values.
_OF_TOKENS = ("g", "gk", "beta", "a", "b")


def refuse(**given: Any) -> None:
    """Raises `NotImplementedError` for arguments that ask for what the engine has not: those that are not `None` or False."""
    for name, argument in given.items():
        if argument is not None and argument is not False:
            raise NotImplementedError(f"{name}: {type(argument).__name__} is not supported; {_INSTEAD[name]}")


def require(**given: Any) -> None:
    """Raises `TypeError` for arrays that are `None`, where the engine would take another operator to be meant."""
    for name, argument in given.items():
        if argument is None:
            raise TypeError(f"{name}: expected an array, got None")


def recurrent(
    q: Any,
    k: Any,
    v: Any,
    *,
    output_final_state: bool | None,
    reverse: bool = False,
    unknown: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[Any, Any | None]:
    """Calls the engine.

    Args:
        q: queries.
        k: keys.
        v: values.
        output_final_state: whether to return the state after the last token; `None` as layers pass it on: no.
        reverse: whether sequences are read from the last token to the first.
        unknown: keywords of the caller that its signature does not name.
        names: what the caller calls arguments of the engine, where that differs, for messages.
        **options: what is not `None` of the options of the extension.

    Returns:
        The outputs, and the final state or `None`.
    """
    for name, given in (unknown or {}).items():
        if name == "chunk_size":
            options[name] = given
        elif name == "transpose_state_layout" and "state_v_first" in options:
            options["state_v_first"] = _renamed_flag(given, replaces=options["state_v_first"])
        elif name not in _WITHOUT_EFFECT and not (name == "head_first" and given is False):
            raise TypeError(f"{name}: expected no such argument, got {type(given).__name__}")
    if options.get("chunk_size") is not None:
        options["chunk_size"] = _chunk(options["chunk_size"])
    try:
        compute = _computed_backwards if reverse else _computed
        results: tuple[Any, Any | None] = compute(
            q, k, v, options, output_final_state=bool(output_final_state)
        )
        return results
    except (ValueError, TypeError, NotImplementedError) as error:
        if names is None:
            raise
        raise type(error)(renamed(str(error), names)) from None


def _chunk(size: Any) -> Any:
    """Returns the length of the engine's chunks that is nearest to one asked for."""
    if not hasattr(size, "__index__"):
        raise TypeError(f"chunk_size: expected an integer, got {type(size).__name__}")
    if size < _SMALLEST_CHUNK or size & (size - 1):
        raise ValueError(f"chunk_size: expected a power of two from {_SMALLEST_CHUNK} on, got {size}")
    return min(size, _LARGEST_CHUNK)


def _computed(q: Any, k: Any, v: Any, options: dict[str, Any], *, output_final_state: bool) -> Any:
    watched = is_watched()
    if not watched:
        try:
            return _native.recurrent(q, k, v, options, output_final_state)
        except REFUSALS:
            if not is_tensor(q):
                raise
    compute = calls().recurrent if watched else calls_at_once().recurrent_as_it_is
    return compute(q, k, v, spelled_out(options), output_final_state=output_final_state)


def _computed_backwards(
    q: Any, k: Any, v: Any, options: dict[str, Any], *, output_final_state: bool
) -> tuple[Any, Any | None]:
    """Computes `_computed` of tokens in the other order, and so packed sequences in the other order, too."""
    turned, cu_seqlens = dict(options), options.get("cu_seqlens")
    for name in _OF_TOKENS:
        turned[name] = backwards(name, options.get(name), 1)
    if cu_seqlens is not None:
        turned["cu_seqlens"] = _bounds_backwards(cu_seqlens, q)
        turned["initial_state"] = backwards("initial_state", options.get("initial_state"), 0)
    q, k, v = (backwards(name, x, 1) for name, x in (("q", q), ("k", k), ("v", v)))
    o, final = _computed(q, k, v, turned, output_final_state=output_final_state)
    if final is not None and cu_seqlens is not None:
        final = contiguous(backwards("final_state", final, 0))
    return contiguous(backwards("o", o, 1)), final


def _bounds_backwards(cu_seqlens: Any, q: Any) -> Any:
    """Returns where packed sequences start if tokens are in the other order; what is no such array as it is."""
    if getattr(q, "ndim", 0) != 4 or getattr(cu_seqlens, "ndim", 0) != 1:
        return cu_seqlens
    # What is wrong with them is said of what was given.
    check_bounds(cu_seqlens, q, q.shape[1])
    return q.shape[1] - backwards("cu_seqlens", cu_seqlens, 0)


def check_bounds(cu_seqlens: Any, rows: Any, tokens: int, *, name: str = "q") -> None:
    """Raises what the engine raises for packed sequences that are none, without computing anything.

    Args:
        cu_seqlens: `[N + 1]`.
        rows: an array of the call, the first axis of which is the batch.
        tokens: how many tokens a row has.
        name: what the caller calls it.
    """
    if rows.shape[0] != 1:
        expected = f"{(1, *rows.shape[1:])}, as cu_seqlens is given"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(rows.shape)}")
    nothing = zeros(rows, (rows.shape[0], tokens, 0, 1), rows.dtype)
    recurrent(nothing, nothing, nothing, cu_seqlens=cu_seqlens, output_final_state=False, names={"q": name})


def _renamed_flag(given: Any, *, replaces: bool) -> Any:
    if replaces:
        raise ValueError("transpose_state_layout: expected no such argument, as state_v_first is given")
    message = "transpose_state_layout is an old name of state_v_first"
    # Of the caller of the operator.
    warnings.warn(message, DeprecationWarning, stacklevel=4)
    return given


def renamed(message: str, names: Mapping[str, str]) -> str:
    """Returns a message of the extension, `name: ... as other has ...`, with the caller's names."""
    name, colon, rest = message.partition(":")
    for old, new in names.items():
        rest = rest.replace(f" as {old} ", f" as {new} ")
    return names.get(name, name) + colon + rest
