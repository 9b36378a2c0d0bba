"""The calls that decoding is timed by, over as many caches as do not fit the processor's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import subquad
from subquad.cli.bench import contenders, tensors, turns
from subquad.cli.bench.decode_shape import DecodeShape
from subquad.cli.bench.tensors import Inputs

_SEED = 20_240_502


class DecodeCalls(NamedTuple):
    """What is timed for one shape and dtype.

    Attributes:
        inputs: Queries, and all keys and values (those appended too) as `[B, S, Hkv, D]`, for checking.
        ours: A call of subquad; the next one takes the next cache.
        theirs: A call of torch's SDPA on the same caches; `None` for what it cannot do, or without torch.
        memory: All the caches, of which calls read each in turn.
    """

    inputs: Inputs
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    memory: Sequence[Any]


def _pages(shape: DecodeShape) -> int:
    """Returns the pages of each sequence; 0 for a contiguous cache."""
    return -(-shape.keys // shape.page_size) if shape.page_size else 0


def _lay_out(shape: DecodeShape, rows: Any, order: npt.NDArray[np.int64] | None) -> Any:
    """Returns a cache of what was there before the call; NaN fills the rest, which must have no influence."""
    capacity = _pages(shape) * shape.page_size or shape.keys
    _, _, heads, width = rows.shape
    if shape.layout == "bhsd":
        cache = tensors.full((shape.batch, heads, capacity, width), np.nan, rows).swapaxes(1, 2)
    else:
        cache = tensors.full((shape.batch, capacity, heads, width), np.nan, rows)
    for entry, length in enumerate(shape.lengths):
        cache[entry, :length] = rows[entry, :length]
    return cache if order is None else cache.reshape(-1, shape.page_size, heads, width)[order]


def _appended(shape: DecodeShape, rows: Any) -> Any:
    new = tensors.full((shape.batch, shape.queries, *rows.shape[2:]), np.nan, rows)
    for entry, length in enumerate(shape.lengths):
        new[entry] = rows[entry, length : length + shape.queries]
    return new


def _ours(
    shape: DecodeShape, inputs: Inputs, caches: Sequence[tuple[Any, Any]], order: npt.NDArray[np.int64] | None
) -> Callable[[], Any]:
    new = {"k": _appended(shape, inputs.k), "v": _appended(shape, inputs.v)} if shape.append else {}
    options = {"cache_seqlens": tensors.integers(shape.lengths, inputs.q), "causal": shape.causal, **new}
    if order is not None:
        # Page `order[i]` of the sequences one after another lies at place `i`.
        table = np.argsort(order).reshape(shape.batch, -1)
        options["block_table"] = tensors.integers(table, inputs.q)

    def bind(k_cache: Any, v_cache: Any) -> Callable[[], Any]:
        return lambda: subquad.attention_with_kvcache(inputs.q, k_cache, v_cache, **options)

    return turns.in_turn([bind(*cache) for cache in caches])


def _theirs(
    shape: DecodeShape, inputs: Inputs, caches: Sequence[tuple[Any, Any]]
) -> Callable[[], Any] | None:
    if shape.page_size or shape.append or len(set(shape.lengths)) > 1:
        return None
    # Caches whose memory is [B, Hkv, S, D] are what torch wants, and are not copied.
    pairs = [contenders.sdpa_calls(shape, Inputs(inputs.q, *cache)) for cache in caches]
    calls = [pair[1] for pair in pairs if pair is not None]
    return turns.in_turn(calls) if calls else None


def make(shape: DecodeShape, dtype: str, *, use_torch: bool) -> DecodeCalls:
    """Returns the calls of a shape, on torch tensors or NumPy arrays, with caches of their own.

    Args:
        shape: Their sizes.
        dtype: Their element type.
        use_torch: Whether they are on torch tensors, and torch is a contender.
    """
    inputs = tensors.make_inputs(shape, dtype, use_torch=use_torch)
    copies = 1 if shape.hot else turns.copies(shape.read_bytes(dtype))
    pages = shape.batch * _pages(shape)
    order = np.random.default_rng(_SEED).permutation(pages) if pages else None
    caches = [(_lay_out(shape, inputs.k, order), _lay_out(shape, inputs.v, order)) for _ in range(copies)]
    theirs = _theirs(shape, inputs, caches) if use_torch else None
    memory = [array for cache in caches for array in cache]
    return DecodeCalls(inputs, _ours(shape, inputs, caches, order), theirs, memory)
