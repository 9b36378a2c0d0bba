"""Arrays in and out: every library, without copying where that is possible."""

import sys
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

import subquad


@pytest.fixture
def arrays(dtype, draw):
    """`q`, `k` and `v` of NumPy."""
    return draw(dtype, 2, 9, 4, 16), draw(dtype, 2, 14, 2, 16), draw(dtype, 2, 14, 2, 8)


def as_numpy(result):
    """Returns any result in float64."""
    return (
        result.double().numpy() if isinstance(result, torch.Tensor) else np.asarray(result).astype(np.float64)
    )


KINDS = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array, "dlpack": np.ndarray}


def test_results_are_of_the_querys_library_and_dtype(library, dtype, arrays, convert):
    out, lse = subquad.attention(*(convert(library, x) for x in arrays), return_lse=True)
    assert isinstance(out, KINDS[library])
    assert isinstance(lse, KINDS[library])
    assert str(out.dtype).removeprefix("torch.") == dtype
    assert str(lse.dtype).removeprefix("torch.") == ("float64" if dtype == "float64" else "float32")
    expected, expected_lse = subquad.attention(*arrays, return_lse=True)
    np.testing.assert_array_equal(as_numpy(out), expected.astype(np.float64))
    np.testing.assert_array_equal(as_numpy(lse), expected_lse.astype(np.float64))


@pytest.mark.parametrize("of", ["bool", "accumulator", "own"])
def test_biases_of_every_library(of, library, dtype, arrays, draw, convert):
    bias = draw(dtype if of == "own" else "float64" if dtype == "float64" else "float32", 9, 14)
    bias = bias > 0 if of == "bool" else bias
    expected = subquad.attention(*arrays, bias=bias)
    out = subquad.attention(*(convert(library, x) for x in arrays), bias=convert(library, bias))
    np.testing.assert_array_equal(as_numpy(out), expected.astype(np.float64))


def test_subclasses_and_parameters(draw):
    q, k, v = draw("float32", 1, 3, 2, 8), draw("float32", 1, 5, 2, 8), draw("float32", 1, 5, 2, 8)
    expected = subquad.attention(q, k, v)

    class Mine(np.ndarray):
        pass

    np.testing.assert_array_equal(subquad.attention(q.view(Mine), k, v), expected)
    parameters = [torch.nn.Parameter(torch.from_numpy(x)) for x in (q, k, v)]
    with torch.no_grad():
        out = subquad.attention(*parameters)
    assert type(out) is torch.Tensor
    assert not out.requires_grad
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_tensors_that_require_grad_are_fine_without_grad_mode(context, draw):
    tensors = [torch.from_numpy(draw("float32", 1, 5, 2, 8)).requires_grad_() for _ in range(3)]
    expected = subquad.attention(*(x.detach().numpy() for x in tensors))
    with context():
        np.testing.assert_array_equal(subquad.attention(*tensors).numpy(), expected)


@pytest.mark.parametrize("kind", ["numpy", "torch", "dlpack"])
def test_inputs_are_not_copied(kind, dtype, draw, convert):
    # A copy of these 2 TiB and more is impossible; the query sees the first key only.
    q, k = draw(dtype, 1, 1, 1, 8), draw(dtype, 1, 1, 1, 8)
    expected = subquad.scaled_dot_product_attention(q, k, k)
    wide = np.lib.stride_tricks.as_strided(k, (1, 1, 1 << 37, 8), (0, 0, 0, k.itemsize))
    if kind != "numpy":
        q, wide = convert("torch", q), convert("torch", k).expand(1, 1, 1 << 37, 8)
    if kind == "dlpack":
        q, wide = Versioned(q), Versioned(wide)
    out = subquad.scaled_dot_product_attention(q, wide, wide, is_causal=True)
    np.testing.assert_array_equal(as_numpy(out), expected.astype(np.float64))


def test_strided_inputs_are_not_copied():
    k, q = np.zeros((1, 1 << 12, 8, 128), np.float32)[:, :, ::2, :96], np.zeros((1, 1, 4, 96), np.float32)
    peaks = []
    # The last one has to be copied, which shows that a copy shows.
    for key, query in [(k, q), (k[..., ::2], q[..., ::2])]:
        tracemalloc.start()
        subquad.attention(query, key, k)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 1 << 16
    assert peaks[1] > 1 << 21


@pytest.mark.parametrize("kind", ["numpy", "torch", "dlpack"])
def test_memory_is_read_when_the_call_is_made(kind, arrays, convert):
    # A copy that is kept would still have the old numbers.
    converted = [convert(kind, x) for x in arrays]
    assert as_numpy(subquad.attention(*converted)).any()
    arrays[2][...] = 0
    assert not as_numpy(subquad.attention(*converted)).any()


def test_only_the_visible_part_of_a_slice_is_read(dtype, draw):
    # What lies between and beyond the elements is not the array's.
    larger = np.full((2, 40, 4, 40), np.nan).astype(draw(dtype, 1).dtype)
    k, v = larger[:, 3:23, 1:3, 5:21], np.full((2, 20, 2, 8), 1, larger.dtype)
    k[...] = draw(dtype, 2, 20, 2, 16)
    q = draw(dtype, 2, 7, 2, 16)
    np.testing.assert_array_equal(subquad.attention(q, k, v), subquad.attention(q, k.copy(), v))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_results_do_not_share_memory_with_inputs(kind, arrays, convert):
    converted = [convert(kind, x) for x in arrays]
    out, lse = subquad.attention(*converted, return_lse=True)
    for result in (out, lse):
        for argument in converted:
            assert not np.shares_memory(as_bytes(result), as_bytes(argument))


def as_bytes(array):
    """Returns the memory of a NumPy array or a tensor."""
    return array.view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array


def test_references_are_given_back(arrays, library, convert):
    converted = [convert(library, x) for x in arrays]
    subquad.attention(*converted)
    before = [sys.getrefcount(x) for x in converted]
    for _ in range(10):
        subquad.attention(*converted, return_lse=True)
        with pytest.raises(TypeError, match="bias"):
            subquad.attention(*converted, bias="no array")
    assert [sys.getrefcount(x) for x in converted] == before


class Versions:
    """An array that speaks DLPack as older or newer libraries do."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Unversioned(Versions):
    """Before DLPack 1.0: `stream` is the only option."""

    def __dlpack__(self, *, stream=None):
        assert stream is None
        return self.array.__dlpack__()


class Versioned(Versions):
    """Since DLPack 1.0."""

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return self.array.__dlpack__(stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)


@pytest.mark.parametrize("protocol", [Unversioned, Versioned])
def test_versions_of_the_protocol(protocol, draw):
    q, k, v = draw("float32", 1, 3, 2, 8), draw("float32", 1, 5, 2, 8), draw("float32", 1, 5, 2, 8)
    out = subquad.attention(protocol(q), protocol(k), protocol(v))
    np.testing.assert_array_equal(out, subquad.attention(q, k, v))


def backwards(array):
    """Returns a view with a negative stride."""
    return np.ascontiguousarray(array[:, ::-1])[:, ::-1]


def read_only(array):
    """Returns a copy that must not be written."""
    array = array.copy()
    array.flags.writeable = False
    return array


def misaligned(array):
    """Returns a view that starts one byte beyond an element."""
    view = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        # PyTorch, which exports the bfloat16 arrays here, has none of the other layouts.
        *(
            (layout, dtype)
            for layout in (np.asfortranarray, backwards, read_only, misaligned)
            for dtype in ("float32", "float64", "float16")
        ),
    ],
)
def test_other_layouts_through_dlpack(layout, dtype, draw):
    q, k, v = draw(dtype, 1, 3, 2, 8), draw(dtype, 1, 5, 2, 8), draw(dtype, 1, 5, 2, 8)
    expected = subquad.attention(q, k, v)
    arrays = [Versioned(x) for x in (layout(q), k, v)]
    np.testing.assert_array_equal(subquad.attention(*arrays), expected)


def test_bfloat16_that_only_numpy_could_copy_is_refused(draw, convert):
    q, k, v = (convert("torch", draw("bfloat16", 1, 5, 2, 8)) for _ in range(3))
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(TypeError, match="q: expected an array that can be copied to contiguous memory"):
        subquad.attention(*map(Versioned, (q, k, v)))


def test_negated_tensors(draw):
    # What PyTorch negates lazily has the old numbers in memory.
    q, k, v = (torch.from_numpy(draw("float32", 1, 5, 2, 1)) for _ in range(3))
    imaginary = torch.complex(torch.zeros_like(q), q).conj().imag
    assert imaginary.is_neg()
    assert torch.equal(imaginary, -q)
    expected = subquad.attention(-q, k, v)
    torch.testing.assert_close(subquad.attention(imaginary, k, v), expected)
    torch.testing.assert_close(subquad.attention(q, torch._neg_view(-k), v), subquad.attention(q, k, v))


# PyTorch scripts its own decompositions when it makes the first dual tensor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_dual_tensors_are_refused(draw):
    # Their tangent would be lost without a word.
    q, k, v = (torch.from_numpy(draw("float32", 1, 5, 2, 8)) for _ in range(3))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match=r"q: .*forward"):
            subquad._native.attention(dual, k, v)


def test_float64_of_jax(draw):
    q = jax.numpy.asarray(draw("float32", 1, 3, 2, 8))
    assert subquad.attention(q, q, q).dtype == np.float32
    jax.config.update("jax_enable_x64", True)
    q = jax.numpy.asarray(draw("float64", 1, 3, 2, 8))
    assert subquad.attention(q, q, q).dtype == np.float64


def test_bfloat16_bits_are_kept(draw):
    # One key: the output is its value, bit by bit, whichever way it came.
    v = draw("bfloat16", 1, 1, 2, 64)
    q = np.zeros((1, 3, 2, 8), ml_dtypes.bfloat16)
    k = np.zeros((1, 1, 2, 8), ml_dtypes.bfloat16)
    out = subquad.attention(q, k, v)
    np.testing.assert_array_equal(out.view(np.uint16), np.broadcast_to(v, out.shape).view(np.uint16))
