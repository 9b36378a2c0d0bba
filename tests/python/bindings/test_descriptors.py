"""DLPack descriptors that few libraries write: offsets, null pointers, extents that no memory has."""

import ctypes

import numpy as np
import pytest

import subquad


class Tensor(ctypes.Structure):
    """`DLTensor` of the protocol."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class ManagedTensor(ctypes.Structure):
    """`DLManagedTensor`, without a deleter."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Exporter:
    """float32 rows behind an offset, described as the test likes."""

    def __init__(self, array, *, offset=0, null=False, shape=None, strides=None):
        self.memory = np.full(array.size + offset // 4, np.nan, np.float32)
        self.memory[offset // 4 :] = array.ravel()
        shape = array.shape if shape is None else shape
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        data = None if null else self.memory.ctypes.data
        steps = None if self.strides is None else ctypes.addressof(self.strides)
        tensor = Tensor(data, 1, 0, len(shape), 2, 32, 1, ctypes.addressof(self.shape), steps, offset)
        self.managed = ManagedTensor(tensor, None, None)

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        return _new_capsule(ctypes.addressof(self.managed), b"dltensor", None)


class FirstForm(Exporter):
    """Knows no versions."""

    def __dlpack__(self, *, stream=None):
        return super().__dlpack__(stream=stream)


@pytest.mark.parametrize("kind", [Exporter, FirstForm])
@pytest.mark.parametrize("offset", [0, 4, 64])
def test_offsets_are_honoured(kind, offset, draw):
    x = draw("float32", 1, 4, 2, 8)
    out = subquad.attention(*(kind(x, offset=offset) for _ in range(3)))
    np.testing.assert_array_equal(out, subquad.attention(x, x, x))


@pytest.mark.parametrize("kind", [Exporter, FirstForm])
@pytest.mark.parametrize("strides", [None, (64, 16, 8, 1), (64, 16, 1, 2), (64, 16, 8, -1)])
def test_null_pointers_are_refused(kind, strides, draw):
    x = draw("float32", 1, 4, 2, 8)
    with pytest.raises(TypeError, match="k: expected an array with data, got a null pointer"):
        subquad.attention(x, kind(x, null=True, offset=64, strides=strides), x)


@pytest.mark.parametrize("kind", [Exporter, FirstForm])
@pytest.mark.parametrize("last", [1, 2, -1])
def test_extents_beyond_memory_are_refused(kind, last, draw):
    x = draw("float32", 1, 4, 2, 8)
    with pytest.raises(OverflowError, match="k: "):
        subquad.attention(x, kind(x, strides=(64, 2**62, 8, last)), x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("length", [10, 30, 64, 100])
def test_no_width(length, widths, causal, dtype, draw):
    q, v = draw(dtype, 1, length, 1, widths[0]), draw(dtype, 1, length, 1, widths[1])
    out, lse = subquad.attention(q, q, v, causal=causal, return_lse=True)
    assert out.shape == (1, length, 1, widths[1])
    seen = np.arange(1, length + 1) if causal else np.full(length, length)
    if widths[0] == 0:
        np.testing.assert_allclose(np.asarray(lse)[0, 0], np.log(seen), rtol=1e-5, atol=1e-5)


def test_bias_of_a_wrong_type_is_refused_without_scores():
    q, none = np.zeros((1, 3, 1, 8), np.float32), np.zeros((1, 0, 1, 8), np.float32)
    with pytest.raises(TypeError, match="bias: expected dtype bool or float32, got int64"):
        subquad.attention(q, none, none, bias=np.zeros((3, 0), np.int64))


def test_more_sequences_than_lengths_can_be_kept_for_are_refused():
    q, cache = np.empty((2**45, 0, 1, 8), np.float32), np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(OverflowError, match="q: "):
        subquad.attention_with_kvcache(q, cache, cache, cache_batch_idx=0, cache_seqlens=2)
