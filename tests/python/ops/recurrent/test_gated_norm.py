"""The gated norm, against its oracle."""

import numpy as np
import pytest
import torch

import subquad
from subquad.ops import rms_norm_gated
from subquad.reference.recurrent import rms_norm_gated as oracle

from .cases import DTYPES, HALF, assert_largest_close, assert_mean_close, bits, wide

WIDTHS = (1, 3, 8, 16, 20, 128, 200)


def draw(shape, dtype, *, beside=None, seed=0):
    normal = np.random.default_rng(seed).standard_normal
    x, g = (3.0 * normal(shape).astype(DTYPES[dtype]) for _ in range(2))
    weight, bias = (normal(shape[-1:]).astype(DTYPES[beside or dtype]) for _ in range(2))
    return x.astype(DTYPES[dtype]), g.astype(DTYPES[dtype]), weight, bias


def check(found, expected, dtype):
    assert str(found.dtype).removeprefix("torch.") == dtype
    if dtype in HALF:
        assert_mean_close(found, expected)
    else:
        assert_largest_close(found, expected, dtype, "out")


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(dtype, library, activation, convert_all):
    for width in WIDTHS:
        arrays = draw((2, 5, 3, width), dtype)
        x, g, weight, bias = convert_all(library, arrays)
        expected = oracle(*map(wide, arrays), activation)[0]
        found = rms_norm_gated(x, g, weight, bias, activation)
        assert isinstance(found, torch.Tensor) == (library == "torch")
        check(found, expected, dtype)
        plain = rms_norm_gated(x, g, None, None, activation, eps=0.5)
        check(plain, oracle(*map(wide, arrays[:2]), activation=activation, eps=0.5)[0], dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_parameters_of_other_types(dtype):
    arrays = draw((4, 40), dtype, beside="float32")
    check(rms_norm_gated(*arrays), oracle(*map(wide, arrays))[0], dtype)


@pytest.mark.parametrize("shape", [(7,), (6, 7), (2, 3, 7), (2, 3, 4, 7), (2, 3, 4, 2, 7), (0, 7), (3, 0)])
def test_ranks(shape):
    arrays = draw(shape, "float32")
    expected = oracle(*map(wide, arrays))[0] if shape[-1] else np.zeros(shape)
    check(rms_norm_gated(*arrays), expected, "float32")


def test_gates_of_another_shape():
    x, g, weight, bias = draw((2, 3, 4, 7), "float32")
    check(rms_norm_gated(x, g.reshape(2, 3, 28), weight, bias), oracle(x, g, weight, bias)[0], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_change_no_bits(dtype):
    x, g, weight, bias = draw((3, 4, 5, 24), dtype)
    expected = bits(rms_norm_gated(x, g, weight, bias))

    def turned(x):
        return np.ascontiguousarray(x.swapaxes(0, 2)).swapaxes(0, 2)

    def apart(x):
        return np.repeat(x, 2, axis=-1)[..., ::2]

    for layout in (turned, apart, lambda x: np.concatenate([x, x], -1)[..., :24]):
        other = rms_norm_gated(layout(x), layout(g), apart(weight), bias)
        np.testing.assert_array_equal(bits(other), expected)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_threads_change_no_bits(num_threads):
    arrays = draw((700, 3, 96), "float32")
    expected = bits(rms_norm_gated(*arrays))
    subquad.set_num_threads(num_threads)
    np.testing.assert_array_equal(bits(rms_norm_gated(*arrays)), expected)


CHECK = """
import numpy as np
import subquad
from subquad.reference.recurrent import rms_norm_gated as oracle
normal = np.random.default_rng(0).standard_normal
for dtype, limit in ((np.float32, 1e-6), (np.float64, 1e-14)):
    for width in (1, 5, 8, 16, 67):
        x, g = normal((2, 9, width)).astype(dtype)
        w, b = normal((2, width)).astype(dtype)
        found = subquad.ops.rms_norm_gated(x, g, w, b)
        expected = oracle(x, g, w, b)[0]
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max(), (dtype, width)
print(subquad._native.config()["level"])
"""


def test_every_level(run_python, levels):
    for level in levels:
        assert run_python(CHECK, SUBQUAD_ISA=level).split() == [level]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals(dtype, library, convert, convert_all):
    arrays = draw((2, 5, 24), dtype)
    residual = np.random.default_rng(1).standard_normal((2, 5, 24)).astype(np.float32)
    expected = oracle(*map(wide, arrays), residual=residual)
    x, g, weight, bias = convert_all(library, arrays)
    weight, bias = (convert(library, wide(one).astype(wide_dtype(dtype))) for one in arrays[2:])
    out, total = rms_norm_gated(x, g, weight, bias, "swish", convert(library, residual), prenorm=True)
    check(out, expected[0], dtype)
    assert_largest_close(total, expected[1], "float32", "total")
    alone = rms_norm_gated(x, g, weight, bias, "swish", convert(library, residual))
    np.testing.assert_array_equal(bits(alone), bits(out))


def wide_dtype(dtype):
    return np.float64 if dtype == "float64" else np.float32


def test_sums_without_a_residual():
    x, g, weight, bias = draw((2, 5, 24), "bfloat16")
    out, total = rms_norm_gated(x, g, weight, bias, prenorm=True)
    assert total is x
    assert out.dtype == x.dtype
    assert rms_norm_gated(x, g, weight, bias, prenorm=True, residual_in_fp32=True)[1].dtype == np.float32


def test_what_is_not_finite():
    x, g, weight, _ = draw((4, 20), "float32")
    x[0, 3], x[1, 5], g[2, 7], g[3, 0] = np.nan, 1e30, np.nan, 1e30
    found = rms_norm_gated(x, g, weight, None)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[2]).tolist() == [i == 7 for i in range(20)]
    assert np.isfinite(np.delete(found[[1, 3]], 0, 1)).all()


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_gradients(activation):
    tensors = [torch.from_numpy(one).requires_grad_() for one in draw((2, 3, 5), "float64")]

    def compute(*tensors):
        return rms_norm_gated(*tensors, activation)

    assert torch.autograd.gradcheck(compute, tensors)
    assert torch.autograd.gradgradcheck(compute, tensors)
    with torch.no_grad():
        expected = compute(*tensors)
    torch.testing.assert_close(compute(*tensors), expected)


def test_compile_and_transforms():
    tensors = [torch.from_numpy(one) for one in draw((2, 3, 5), "float32")]
    expected = rms_norm_gated(*tensors)
    compiled = torch.compile(rms_norm_gated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), expected)
    torch._dynamo.reset()
    mapped = torch.func.vmap(rms_norm_gated, (0, 0, None, None))
    torch.testing.assert_close(mapped(*tensors), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rms_norm_gated(*tensors), expected)


def test_bad_input():
    x, g, weight, bias = draw((2, 3, 8), "float32")
    with pytest.raises(ValueError, match=r"^activation: expected 'swish', 'silu' or 'sigmoid', got 'relu'"):
        rms_norm_gated(x, g, weight, bias, "relu")
    with pytest.raises(ValueError, match=r"^g: expected shape \(2, 3, 8\) as x has"):
        rms_norm_gated(x, g[:1], weight, bias)
    for name, wrong in (("weight", (weight[1:], bias)), ("bias", (weight, bias[None]))):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(8,\)"):
            rms_norm_gated(x, g, *wrong)
    with pytest.raises(ValueError, match=r"^residual: expected shape \(2, 3, 8\) as x has"):
        rms_norm_gated(x, g, weight, bias, residual=x[:1])
    for convert in (np.asarray, torch.from_numpy):
        arguments = [convert(one) for one in (x, g, weight, bias)]
        with pytest.raises(TypeError, match=r"^g: expected dtype float32 as x has"):
            rms_norm_gated(arguments[0], convert(g.astype(np.float64)), *arguments[2:])
        with pytest.raises(TypeError, match=r"^weight: expected dtype float32"):
            rms_norm_gated(*arguments[:2], convert(weight.astype(np.float16)), arguments[3])
        with pytest.raises(TypeError, match=r"^x: expected dtype float32, float64, float16 or bfloat16"):
            rms_norm_gated(*(convert(one.astype(np.int32)) for one in (x, g, weight, bias)))
    with pytest.raises(TypeError, match=r"^g: expected a NumPy array"):
        rms_norm_gated(x, torch.from_numpy(g), weight, bias)
