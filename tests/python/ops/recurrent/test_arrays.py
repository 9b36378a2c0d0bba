"""Arrays of every layout and library, and numbers of threads: the same bits."""

import inspect

import numpy as np
import pytest
import torch

import subquad
from subquad import ops

from .cases import (
    DTYPES,
    FIRST,
    FORMS,
    Sizes,
    about,
    assert_largest_close,
    assert_same_bits,
    bits,
    bounds_of,
    call,
    check,
    draw_inputs,
    draw_states,
    problem,
)

SIZES = Sizes(tokens=37)


def padded(x):
    """In the middle of a larger array of NaN."""
    whole = np.full([n + 2 for n in x.shape], np.nan, x.dtype)
    inside = whole[tuple(slice(1, -1) for _ in x.shape)]
    inside[...] = x
    return inside


def heads_first(x):
    """As `[B, H, T, ...]` lies in memory."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def tokens_first(x):
    """As `[T, B, ...]` lies in memory."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)


def last_axis_apart(x):
    """Every other element of rows."""
    whole = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    whole[..., ::2] = x
    return whole[..., ::2]


def backwards(x):
    """With negative strides."""
    return np.ascontiguousarray(x[::-1, ::-1, ..., ::-1])[::-1, ::-1, ..., ::-1]


def misaligned(x):
    """One byte off."""
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[...] = x
    return raw


def writable(x):
    """A copy that may be written, as problems are read-only."""
    return x.copy()


LAYOUTS = (padded, heads_first, tokens_first, last_axis_apart, backwards, misaligned, writable)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form, dtype):
    named = FORMS[form]
    given = problem(named.family, SIZES, dtype, has_state=named.has_state)
    states = given.states if named.has_state else None
    expected = call(form, given.inputs, states)
    for layout in LAYOUTS:
        inputs = {name: layout(x) if x.ndim > 2 else x[::-1].copy()[::-1] for name, x in given.inputs.items()}
        found = call(form, inputs, None if states is None else tuple(layout(x) for x in states))
        with about(layout.__name__):
            assert_same_bits(found, expected)
            assert all(x.flags.c_contiguous for x in (found[0], *found[1]))


@pytest.mark.parametrize("form", FORMS)
def test_arrays_that_repeat(form):
    named = FORMS[form]
    given = problem(named.family, SIZES, "float32", has_state=False)
    # Of the two rows of a batch, and of two heads.
    for axis in (0, 2):
        views = {
            name: np.broadcast_to(np.take(x, [0], axis), x.shape) if x.ndim > 2 else x
            for name, x in given.inputs.items()
        }
        copies = {name: x.copy() for name, x in views.items()}
        assert_same_bits(call(form, views), call(form, copies))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_torch_and_numpy_give_the_same_bits(form, dtype, convert_all):
    named = FORMS[form]
    for length in (1, 37):
        given = problem(named.family, Sizes(tokens=length), dtype, has_state=named.has_state)
        states = given.states if named.has_state else None
        foreign = None if states is None else convert_all("torch", states)
        found = call(form, convert_all("torch", given.inputs), foreign)
        assert all(isinstance(x, torch.Tensor) for x in (found[0], *found[1]))
        assert_same_bits(found, call(form, given.inputs, states))


@pytest.mark.parametrize("form", [name for name in FORMS if "parallel_delta_rule" not in name])
def test_torch_and_numpy_give_the_same_bits_of_packed_sequences(form, convert_all):
    named, lengths = FORMS[form], (3, 0, 30)
    sizes = Sizes(batch=1, tokens=33)
    arrays = {**draw_inputs(named.family, sizes, "float32"), "cu_seqlens": bounds_of(lengths)}
    states = draw_states(named.family, sizes, "float32", sequences=3) if named.has_state else None
    foreign = None if states is None else convert_all("torch", states)
    assert_same_bits(call(form, convert_all("torch", arrays), foreign), call(form, arrays, states))


# They compute with the functions of a library, which bare DLPack does not have.
WITH_A_LIBRARY = ("normalized", "retention", "lightning_attn", "gated_delta_product")


@pytest.mark.parametrize("library", ["jax", "dlpack"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FIRST)
def test_other_libraries(family, dtype, library, convert_all):
    given = problem(family, SIZES, dtype)
    inputs, states = convert_all(library, given.inputs), convert_all(library, given.states)
    if library == "dlpack" and family in WITH_A_LIBRARY:
        with pytest.raises(TypeError, match=r"^q: expected a PyTorch tensor, a NumPy array or another array"):
            call(FIRST[family], inputs, states)
        return
    o, finals = call(FIRST[family], inputs, states)
    if library == "jax":
        assert all(type(x) is type(inputs["k"]) for x in (o, *finals))
    expected, expected_finals = call(FIRST[family], given.inputs, given.states)
    for x, y in zip((o, *finals), (expected, *expected_finals), strict=True):
        if family == "normalized":
            # JAX divides otherwise.
            assert_largest_close(np.asarray(x), y.astype(np.float64), dtype, "o")
        else:
            np.testing.assert_array_equal(bits(np.asarray(x)), bits(y))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_bits(form, dtype, keep_num_threads):
    named = FORMS[form]
    for length in (1, 100):
        given = problem(named.family, Sizes(tokens=length), dtype, has_state=named.has_state)
        states = given.states if named.has_state else None
        results = []
        for threads in (1, 2, 3, 1):
            subquad.set_num_threads(threads)
            results.append(call(form, given.inputs, states))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("form", FORMS)
def test_heads_may_be_permuted(form):
    named = FORMS[form]
    if named.family in {"constant", "retention", "lightning_attn"}:
        return
    given = problem(named.family, SIZES, "float32", has_state=named.has_state)
    expected = call(form, given.inputs, given.states if named.has_state else None)
    inputs = {name: x[:, :, ::-1] if x.ndim > 2 else x[::-1] for name, x in given.inputs.items()}
    states = tuple(x[:, ::-1] if x.shape[1] > 1 else x[:, :, ::-1] for x in given.states)
    o, finals = call(form, inputs, states if named.has_state else None)
    finals = tuple(x[:, ::-1] if x.shape[1] > 1 else x[:, :, ::-1] for x in finals)
    assert_same_bits((o[:, :, ::-1], finals), expected)


@pytest.mark.parametrize("form", FORMS)
def test_sizes_of_chunks(form):
    named = FORMS[form]
    parameters = inspect.signature(getattr(ops, named.function)).parameters
    given = problem(named.family, SIZES, "float64", has_state=named.has_state)
    if not {"chunk_size", "kwargs"} & set(parameters):
        with pytest.raises(TypeError, match="chunk_size"):
            call(form, given.inputs, chunk_size=16)
        return
    states = given.states if named.has_state else None
    found = {size: call(form, given.inputs, states, chunk_size=size) for size in (16, 32, 64, 128, 4096)}
    for one in found.values():
        check(one, given.expected, "float64")
    # Chunks are no longer than that.
    assert_same_bits(found[128], found[64])
    assert_same_bits(found[4096], found[64])
    assert_same_bits(call(form, given.inputs, states, chunk_size=np.int64(32)), found[32])
