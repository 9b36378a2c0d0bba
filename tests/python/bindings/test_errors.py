"""Every error has its exception, and names the argument, what was expected and what came."""

import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import subquad

SOURCE = Path(__file__).parents[3] / "src" / "error.rs"


def zeros(*shape, dtype=np.float32):
    """Returns an array of NumPy."""
    return np.zeros(shape, dtype)


def tensor(*shape, **options):
    """Returns a tensor of PyTorch."""
    return torch.zeros(*shape, **options)


def expanded(*shape):
    """Returns a tensor of a few numbers and any size."""
    return torch.zeros(shape[-1]).expand(*shape)


def sharing(*shape, strides):
    """Returns an array whose elements share memory."""
    return np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), shape, [4 * s for s in strides])


def quantized(*shape):
    """Returns a tensor of 8-bit integers that stand for numbers."""
    return torch.quantize_per_tensor(tensor(*shape), 0.1, 0, torch.qint8)


def nested(layout):
    """Returns a tensor of sequences of different lengths."""
    return torch.nested.nested_tensor([tensor(3, 4, 8), tensor(5, 4, 8)], layout=layout)


def fake(*shape):
    """Returns a tensor without memory that says it is on the CPU."""
    return FakeTensorMode().from_tensor(tensor(*shape))


class Elsewhere:
    """An array that says it is on a GPU."""

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        raise AssertionError("asked for memory of another device")


class Broken:
    """An array whose export fails."""

    def __init__(self, error):
        self.error = error

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_):
        raise self.error


def attention(q=None, k=None, v=None, **options):
    """Calls `attention` with one thing wrong: q `[1, 3, 4, 8]`, k `[1, 5, 2, 8]`, v `[1, 5, 2, 6]`."""
    q = zeros(1, 3, 4, 8) if q is None else q
    k = zeros(1, 5, 2, 8) if k is None else k
    v = zeros(1, 5, 2, 6) if v is None else v
    return lambda: subquad.attention(q, k, v, **options)


def torch_attention(q=None, k=None, v=None, **options):
    """The same with tensors."""
    q = tensor(1, 3, 4, 8) if q is None else q
    k = tensor(1, 5, 2, 8) if k is None else k
    v = tensor(1, 5, 2, 6) if v is None else v
    return attention(q, k, v, **options)


def extension(q=None, k=None, v=None, **options):
    """The same without what stands in for the extension where PyTorch has to know of a call."""
    q = tensor(1, 3, 4, 8) if q is None else q
    k = tensor(1, 5, 2, 8) if k is None else k
    v = tensor(1, 5, 2, 6) if v is None else v
    return lambda: subquad._native.attention(q, k, v, **options)


def sdpa(query=None, key=None, value=None, mask=None, **options):
    """Calls the other function: query `[2, 4, 3, 8]`, key `[2, 4, 5, 8]`, value `[2, 4, 5, 6]`."""
    query = zeros(2, 4, 3, 8) if query is None else query
    key = zeros(2, 4, 5, 8) if key is None else key
    value = zeros(2, 4, 5, 6) if value is None else value
    return lambda: subquad.scaled_dot_product_attention(query, key, value, mask, **options)


def later(function, make):
    """Makes the first argument of a call when the call is made: PyTorch warns of some tensors."""

    def call():
        return function(make())()

    return call


Q, K = zeros(1, 3, 4, 8), zeros(1, 5, 2, 8)
OUT, READ_ONLY = zeros(1, 3, 4, 6), zeros(1, 3, 4, 6)
READ_ONLY.flags.writeable = False
ANY_FLOAT = "float32, float64, float16 or bfloat16"

# Variant of src/error.rs, call, argument, what was expected, what came.
ERRORS = [
    # Ranks and extents.
    ("Shape", attention(q=zeros(3, 4, 8)), "q", r"rank 4, \[B, Sq, H, D\]", r"\(3, 4, 8\)"),
    ("Shape", attention(k=zeros(5, 2, 8)), "k", r"rank 4, \[B, Sk, Hkv, D\]", r"\(5, 2, 8\)"),
    ("Shape", attention(v=zeros(1, 1, 5, 2, 6)), "v", r"rank 4, \[B, Sk, Hkv, Dv\]", r"\(1, 1, 5, 2, 6\)"),
    ("Shape", attention(q=np.array(0, np.float32)), "q", "rank 4", r"\(\)"),
    ("Shape", attention(k=zeros(2, 5, 2, 8)), "k", "batch size 1 as q has", r"\(2, 5, 2, 8\)"),
    ("Shape", attention(k=zeros(1, 5, 2, 7)), "k", "head_dim 8 as q has", r"\(1, 5, 2, 7\)"),
    ("Shape", attention(k=zeros(1, 5, 3, 8), v=zeros(1, 5, 3, 6)), "k", "divides q's 4", r"\(1, 5, 3, 8\)"),
    ("Shape", attention(k=zeros(1, 5, 0, 8), v=zeros(1, 5, 0, 6)), "k", "divides q's 4", r"\(1, 5, 0, 8\)"),
    ("Shape", attention(k=zeros(1, 5, 8, 8), v=zeros(1, 5, 8, 6)), "k", "divides q's 4", r"\(1, 5, 8, 8\)"),
    ("Shape", attention(v=zeros(1, 4, 2, 6)), "v", "batch 1, length 5 and 2 heads", r"\(1, 4, 2, 6\)"),
    ("Shape", attention(v=zeros(1, 5, 4, 6)), "v", "batch 1, length 5 and 2 heads", r"\(1, 5, 4, 6\)"),
    ("Shape", attention(v=zeros(2, 5, 2, 6)), "v", "batch 1, length 5 and 2 heads", r"\(2, 5, 2, 6\)"),
    ("Shape", attention(bias=zeros(4, 5)), "bias", r"broadcasts to \(1, 4, 3, 5\)", r"\(4, 5\)"),
    (
        "Shape",
        attention(bias=zeros(1, 1, 4, 3, 5)),
        "bias",
        r"broadcasts to \(1, 4, 3, 5\)",
        r"\(1, 1, 4, 3, 5\)",
    ),
    ("Shape", attention(bias=zeros(2, 4, 3, 5)), "bias", r"broadcasts to \(1, 4, 3, 5\)", r"\(2, 4, 3, 5\)"),
    ("Shape", attention(bias=zeros(0, 5)), "bias", r"broadcasts to \(1, 4, 3, 5\)", r"\(0, 5\)"),
    ("Shape", attention(out=zeros(1, 3, 4, 8)), "out", r"\(1, 3, 4, 6\)", r"\(1, 3, 4, 8\)"),
    ("Shape", attention(out=zeros(3, 4, 6)), "out", r"\(1, 3, 4, 6\)", r"\(3, 4, 6\)"),
    (
        "Shape",
        attention(out=zeros(1, 3, 4, 12)[..., ::2]),
        "out",
        "contiguous last axis",
        r"strides \[.*, 2\]",
    ),
    ("Shape", attention(out=np.asfortranarray(zeros(1, 3, 4, 6))), "out", "contiguous last axis", "strides"),
    ("Shape", sdpa(query=zeros(8)), "query", r"rank 2 or more, \[\.\.\., H, L, E\]", r"\(8,\)"),
    ("Shape", sdpa(key=zeros(8)), "key", "rank 2 or more", r"\(8,\)"),
    ("Shape", sdpa(value=np.array(0, np.float32)), "value", "rank 2 or more", r"\(\)"),
    ("Shape", sdpa(key=zeros(3, 4, 5, 8)), "key", r"broadcast with query's \(2,\)", r"\(3, 4, 5, 8\)"),
    ("Shape", sdpa(value=zeros(3, 4, 5, 6)), "value", r"broadcast with query's \(2,\)", r"\(3, 4, 5, 6\)"),
    ("Shape", sdpa(key=zeros(2, 2, 5, 8)), "key", "4 heads as query has .*enable_gqa", r"\(2, 2, 5, 8\)"),
    ("Shape", sdpa(value=zeros(2, 2, 5, 6)), "value", "4 heads as query has .*enable_gqa", r"\(2, 2, 5, 6\)"),
    ("Shape", sdpa(key=zeros(2, 4, 5, 7)), "key", "head_dim 8 as query has", r"\(2, 4, 5, 7\)"),
    ("Shape", sdpa(value=zeros(2, 4, 9, 6)), "value", "length 5", r"\(2, 4, 9, 6\)"),
    (
        "Shape",
        sdpa(key=zeros(2, 3, 5, 8), value=zeros(2, 3, 5, 6), enable_gqa=True),
        "key",
        "divides query's 4",
        r"\(2, 3, 5, 8\)",
    ),
    ("Shape", sdpa(mask=zeros(4, 5)), "attn_mask", r"broadcasts to \(2, 4, 3, 5\)", r"\(4, 5\)"),
    ("Shape", sdpa(mask=zeros(7, 1, 3, 5)), "attn_mask", r"broadcasts to \(2, 4, 3, 5\)", r"\(7, 1, 3, 5\)"),
    # Element types.
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=np.int32)), "q", ANY_FLOAT, "int32"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=np.complex64)), "q", ANY_FLOAT, "complex64"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=np.longdouble)), "q", ANY_FLOAT, "float128|longdouble"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=bool)), "q", ANY_FLOAT, "bool"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=object)), "q", ANY_FLOAT, "object"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype="U3")), "q", ANY_FLOAT, "U3"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype="V2")), "q", ANY_FLOAT, "V2"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=[("x", "f4")])), "q", ANY_FLOAT, "x"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=ml_dtypes.float8_e4m3fn)), "q", ANY_FLOAT, "float8_e4m3fn"),
    ("DType", attention(q=zeros(1, 3, 4, 8, dtype=">f4")), "q", ANY_FLOAT, ">f4"),
    ("DType", attention(k=zeros(1, 5, 2, 8, dtype=">f4")), "k", "float32 as q has", ">f4"),
    ("DType", attention(k=zeros(1, 5, 2, 8, dtype=np.float64)), "k", "float32 as q has", "float64"),
    ("DType", attention(v=zeros(1, 5, 2, 6, dtype=np.float16)), "v", "float32 as q has", "float16"),
    ("DType", attention(bias=zeros(3, 5, dtype=np.float64)), "bias", "bool or float32", "float64"),
    ("DType", attention(bias=zeros(3, 5, dtype=np.int64)), "bias", "bool or float32", "int64"),
    ("DType", attention(bias=zeros(3, 5, dtype=">f4")), "bias", "bool or float32", ">f4"),
    ("DType", attention(out=zeros(1, 3, 4, 6, dtype=np.float64)), "out", "float32 as q has", "float64"),
    ("DType", torch_attention(q=tensor(1, 3, 4, 8, dtype=torch.int64)), "q", ANY_FLOAT, "int64"),
    ("DType", torch_attention(q=tensor(1, 3, 4, 8, dtype=torch.cfloat)), "q", ANY_FLOAT, "complex64"),
    ("DType", torch_attention(q=tensor(1, 3, 4, 8, dtype=torch.float8_e5m2)), "q", ANY_FLOAT, "8"),
    (
        "DType",
        torch_attention(v=tensor(1, 5, 2, 6, dtype=torch.bfloat16)),
        "v",
        "float32 as q has",
        "bfloat16",
    ),
    ("DType", sdpa(*(zeros(2, 4, 3, 8, dtype=np.uint8) for _ in range(3))), "query", ANY_FLOAT, "uint8"),
    ("DType", sdpa(mask=zeros(3, 5, dtype=np.uint8)), "attn_mask", "bool or float32", "uint8"),
    (
        "DType",
        sdpa(
            *(zeros(2, 4, 3, 8, dtype=ml_dtypes.bfloat16) for _ in range(3)),
            mask=zeros(3, 3, dtype=np.float16),
        ),
        "attn_mask",
        "bool, bfloat16 or float32",
        "float16",
    ),
    # What is no array, and arrays of two libraries.
    ("Kind", attention(q="q"), "q", "__dlpack__", "str"),
    ("Kind", attention(q=[[0.0]]), "q", "__dlpack__", "list"),
    ("Kind", attention(q=np.ma.masked_array(Q, mask=True)), "q", "plain array", "masked array"),
    ("Kind", attention(k=1.5), "k", "__dlpack__", "float"),
    ("Kind", attention(v=np.float32(1)), "v", "__dlpack__", r"numpy\.float32"),
    ("Kind", attention(q=memoryview(Q)), "q", "__dlpack__", "memoryview"),
    ("Kind", lambda: subquad.attention(None, K, K), "q", "__dlpack__", "NoneType"),
    ("Kind", attention(bias=[[0.0]]), "bias", "__dlpack__", "list"),
    ("Kind", attention(out="out"), "out", "__dlpack__", "str"),
    ("Kind", attention(q=np.ndarray), "q", "array", "type"),
    ("Kind", attention(k=tensor(1, 5, 2, 8)), "k", "a NumPy array as q is", "a PyTorch tensor"),
    (
        "Kind",
        attention(v=jax.numpy.zeros((1, 5, 2, 6), np.float32)),
        "v",
        "a NumPy array as q is",
        "a DLPack array",
    ),
    ("Kind", attention(out=tensor(1, 3, 4, 6)), "out", "a NumPy array as q is", "a PyTorch tensor"),
    ("Kind", attention(bias=tensor(3, 5)), "bias", "a NumPy array as q is", "a PyTorch tensor"),
    ("Kind", torch_attention(k=K), "k", "a PyTorch tensor as q is", "a NumPy array"),
    ("Kind", attention(q=Broken(BufferError("no export"))), "q", "dense CPU array", "no export"),
    (
        "Kind",
        later(torch_attention, lambda: tensor(1, 3, 4, 8).to_sparse()),
        "q",
        "dense CPU array",
        "Tensor",
    ),
    ("Kind", later(sdpa, lambda: tensor(3, 8).to_sparse_csr()), "query", "dense CPU array", "Tensor"),
    (
        "Kind",
        later(torch_attention, lambda: tensor(1, 3, 4, 8).to_mkldnn()),
        "q",
        "dense CPU array",
        "Tensor",
    ),
    ("Kind", later(torch_attention, lambda: quantized(1, 3, 4, 8)), "q", "dense CPU array", "Tensor"),
    ("Kind", later(sdpa, lambda: nested(torch.strided)), "query", "dense CPU array", "Tensor"),
    ("Kind", later(sdpa, lambda: nested(torch.jagged)), "query", "dense CPU array", "NestedTensor"),
    ("Kind", later(extension, lambda: fake(1, 3, 4, 8)), "q", "an array with data", "a null pointer"),
    ("Kind", lambda: jax.jit(subquad.attention)(Q, K, K), "q", "dense CPU array", "Tracer"),
    (
        "Kind",
        lambda: torch.vmap(subquad._native.attention)(*[tensor(2, 1, 3, 4, 8)] * 3),
        "q",
        "dense CPU array",
        "Tensor",
    ),
    # Numbers.
    ("Value", lambda: subquad.set_num_threads(0), "num_threads", "an integer from 1 to 1024", "0"),
    ("Value", lambda: subquad.set_num_threads(-3), "num_threads", "an integer from 1 to 1024", "-3"),
    ("Value", lambda: subquad.set_num_threads(1025), "num_threads", "an integer from 1 to 1024", "1025"),
    ("Value", lambda: subquad._native.probe_peak("f16"), "kind", "f32, f64 or bf16", "f16"),
    ("Value", lambda: subquad._native.probe_peak("f32", level="sse9"), "level", "scalar", "sse9"),
    (
        "Value",
        lambda: subquad._native.probe_peak("bf16", level="scalar"),
        "level",
        "bf16 dot products",
        "scalar",
    ),
    ("Value", lambda: subquad._native.probe_peak("f32", seconds=-1.0), "seconds", "0 to 600", "-1"),
    ("Value", lambda: subquad._native.probe_peak("f32", seconds=float("nan")), "seconds", "0 to 600", "NaN"),
    ("Value", lambda: subquad._native.probe_peak("f32", num_threads=0), "num_threads", "1 to 1024", "0"),
    ("Value", lambda: subquad._native.probe_read([], num_threads=0), "num_threads", "1 to 1024", "0"),
    # Other devices.
    ("Device", torch_attention(q=tensor(1, 3, 4, 8, device="meta")), "q", "CPU array", r"meta; .*\.cpu\(\)"),
    ("Device", torch_attention(bias=tensor(3, 5, device="meta")), "bias", "CPU array", "meta"),
    ("Device", torch_attention(out=tensor(1, 3, 4, 6, device="meta")), "out", "CPU array", "meta"),
    ("Device", sdpa(value=tensor(2, 4, 5, 6, device="meta")), "value", "CPU array", "meta"),
    ("Device", attention(k=Elsewhere()), "k", "CPU array", "device type 2"),
    # Memory of the output.
    ("Overlap", attention(q=Q, v=zeros(1, 5, 2, 8), out=Q), "out", "memory of its own", "overlaps q"),
    (
        "Overlap",
        attention(q=zeros(1, 5, 2, 8), k=K, v=zeros(1, 5, 2, 8), out=K),
        "out",
        "its own",
        "overlaps k",
    ),
    (
        "Overlap",
        lambda: subquad.attention(Q, Q, (x := zeros(1, 3, 4, 8)), out=x),
        "out",
        "its own",
        "overlaps v",
    ),
    ("Overlap", attention(bias=OUT[0, :, :1, 1], out=OUT), "out", "its own", "overlaps bias"),
    (
        "Overlap",
        lambda: subquad.attention((x := tensor(1, 3, 4, 8)), x, x, out=x),
        "out",
        "its own",
        "overlaps q",
    ),
    ("NotWritable", attention(out=READ_ONLY), "out", "a writable array", "read-only"),
    (
        "NotWritable",
        attention(out=sharing(1, 3, 4, 6, strides=(0, 0, 6, 1))),
        "out",
        "writable",
        "share memory",
    ),
    (
        "NotWritable",
        attention(out=sharing(1, 3, 4, 6, strides=(0, 20, 5, 1))),
        "out",
        "writable",
        "share memory",
    ),
    (
        "NotWritable",
        torch_attention(out=tensor(1, 1, 4, 6).expand(1, 3, 4, 6)),
        "out",
        "writable",
        "share memory",
    ),
    # What is right but not here.
    ("Unsupported", attention(zeros(1, 3, 4, 1025), zeros(1, 5, 2, 1025)), "q", "head_dim 1025", "1 to 1024"),
    ("Unsupported", attention(v=zeros(1, 5, 2, 1025)), "v", "head_dim 1025", "1 to 1024"),
    ("Unsupported", sdpa(zeros(2, 4, 3, 1999), zeros(2, 4, 5, 1999)), "query", "head_dim 1999", "1 to 1024"),
    ("Unsupported", sdpa(dropout_p=0.1), "dropout_p", "probability 0.1", r"torch\.nn\.functional\."),
    (
        "Unsupported",
        extension(q=tensor(1, 3, 4, 8, requires_grad=True)),
        "q",
        "requires grad",
        "no_grad",
    ),
    (
        "Unsupported",
        extension(v=tensor(1, 5, 2, 6, requires_grad=True)),
        "v",
        "requires grad",
        "no_grad",
    ),
    (
        "Unsupported",
        extension(bias=tensor(3, 5, requires_grad=True)),
        "bias",
        "requires grad",
        "no_grad",
    ),
    (
        "Unsupported",
        extension(out=tensor(1, 3, 4, 6, requires_grad=True)),
        "out",
        "requires grad",
        "no_grad",
    ),
    (
        "Unsupported",
        lambda: subquad._native.scaled_dot_product_attention(*[tensor(2, 4, 3, 8, requires_grad=True)] * 3),
        "query",
        "requires grad",
        "detach",
    ),
    # Sizes.
    (
        "Overflow",
        attention(expanded(1 << 31, 1 << 31, 1, 1), expanded(1 << 31, 1, 1, 1), expanded(1 << 31, 1, 1, 512)),
        "out",
        "fits in memory",
        r"\(2147483648, 2147483648, 1, 512\)",
    ),
    (
        "Overflow",
        attention(*(expanded(0, 1 << 40, 1 << 20, 8) for _ in range(3))),
        "out",
        "fits in memory",
        r"\(0, 1099511627776, 1048576, 8\)",
    ),
    (
        "Overflow",
        sdpa(expanded(1 << 31, 1 << 31, 1, 1), expanded(1 << 31, 1 << 31, 1, 1), expanded(1, 1, 1, 512)),
        "out",
        "fits in memory",
        "2147483648",
    ),
]

EXCEPTIONS = {
    "Shape": ValueError,
    "DType": TypeError,
    "Kind": TypeError,
    "Value": ValueError,
    "Device": ValueError,
    "Overlap": ValueError,
    "NotWritable": ValueError,
    "Unsupported": NotImplementedError,
    "Overflow": OverflowError,
}


def test_every_variant_is_here():
    variants = re.findall(r"^    (\w+) \{$", SOURCE.read_text(encoding="utf-8"), flags=re.M)
    assert set(variants) == set(EXCEPTIONS) == {row[0] for row in ERRORS}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("variant", "call", "argument", "expected", "got"),
    ERRORS,
    ids=[f"{i}-{row[0]}-{row[2]}" for i, row in enumerate(ERRORS)],
)
def test_error(variant, call, argument, expected, got):
    with pytest.raises(EXCEPTIONS[variant]) as caught:
        call()
    message = str(caught.value)
    # Exactly the documented class: a RuntimeError, for one, is no NotImplementedError.
    assert caught.type is EXCEPTIONS[variant]
    assert message.startswith(f"{argument}: ")
    assert re.search(f"{expected}.*{got}", message), message
    # One line: what a library adds to its own errors, such as a stack of C++ frames, is not for the reader.
    assert "\n" not in message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subquad.attention(Q, K), "missing 1 required positional argument: 'v'"),
        (lambda: subquad.attention(Q, K, K, True), "takes 3 positional arguments"),
        (lambda: subquad.attention(Q, K, K, window=(1, 1)), "unexpected keyword argument 'window'"),
        (attention(scale="a"), "scale|real number"),
        (attention(causal=1), "causal|bool"),
        (attention(causal=None), "causal|bool"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        attention(q=Broken(KeyboardInterrupt()))()


def test_inputs_are_left_alone_by_a_call_that_fails():
    out = np.ones((1, 3, 4, 6), np.float32)
    with pytest.raises(ValueError, match="bias"):
        attention(out=out, bias=zeros(4, 5))()
    assert (out == 1).all()
