"""Checking of results: a right one passes, and a wrong one is caught wherever it is wrong."""

import numpy as np
import pytest

import subquad
from subquad.cli.bench import contenders, tensors, verify
from subquad.cli.bench.decode_shape import DecodeShape
from subquad.cli.bench.shapes import Shape

SIZES = {"heads": 4, "kv_heads": 2, "keys": 50, "head_dim_v": 5, "causal": True}


def make_shape(dtype: str = "float32", **changes) -> Shape:
    return Shape(
        **{"name": "a", "batch": 3, "queries": 40, "head_dim": 8, "dtypes": (dtype,), **SIZES, **changes}
    )


@pytest.fixture
def case():
    shape = make_shape()
    inputs = tensors.make_inputs(shape, "float32", use_torch=False)
    return shape, inputs, np.array(contenders.ours_call(shape, inputs)())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "changes", [{}, {"causal": False}, {"keys": 7}, {"batch": 1, "queries": 1}, {"queries": 5}]
)
@pytest.mark.parametrize("use_torch", [False, True])
def test_right_results_pass(dtype, changes, use_torch):
    if use_torch:
        pytest.importorskip("torch")
    elif tensors.numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")
    shape = make_shape(dtype, **changes)
    inputs = tensors.make_inputs(shape, dtype, use_torch=use_torch)
    sdpa = contenders.sdpa_calls(shape, inputs) if use_torch else None
    theirs = None if sdpa is None else sdpa[1]()
    found = verify.check(shape, dtype, inputs, contenders.ours_call(shape, inputs)(), theirs)
    assert found.failure == ""
    assert 0 <= found.error <= verify._TOLERANCE[dtype]


# First, middle and last rows of the first and of the last batch entry.
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (0, 19, 3, 4), (0, 39, 1, 2), (2, 3, 2, 0), (2, 36, 0, 1)])
@pytest.mark.parametrize("change", [1e-4, -1e-4, np.nan, np.inf])
def test_one_wrong_element(case, place, change):
    shape, inputs, out = case
    assert verify.check(shape, "float32", inputs, out, None).failure == ""
    out[place] += change
    found = verify.check(shape, "float32", inputs, out, None)
    assert "off by" in found.failure
    assert "from the float64 oracle" in found.failure
    assert not found.error <= 9e-5


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_a_number_where_the_oracle_does_not_look(case, value):
    shape, inputs, out = case
    out[1, 10, 0, 0] = value
    assert verify.check(shape, "float32", inputs, out, None).failure == "NaN or infinity in the result"


def test_any_element_against_torch():
    pytest.importorskip("torch")
    shape = make_shape(queries=50)
    inputs = tensors.make_inputs(shape, "float32", use_torch=True)
    sdpa = contenders.sdpa_calls(shape, inputs)
    assert sdpa is not None
    out, theirs = contenders.ours_call(shape, inputs)(), sdpa[1]()
    assert verify.check(shape, "float32", inputs, out, theirs).failure == ""
    for place in [(1, 10, 0, 0), (1, 0, 3, 4), (0, 12, 2, 2)]:
        wrong = out.clone()
        wrong[place] += 1e-4
        assert "from torch" in verify.check(shape, "float32", inputs, wrong, theirs).failure
    theirs[0, 0, 0, 0] = float("nan")
    assert "off by nan from torch" in verify.check(shape, "float32", inputs, out, theirs).failure


def test_another_mask_is_caught(case):
    shape, inputs, _ = case
    out = subquad.attention(*inputs, causal=False)
    assert "off by" in verify.check(shape, "float32", inputs, out, None).failure


def test_another_shape_or_dtype_is_caught(case):
    shape, inputs, out = case
    for wrong in (out[:, :-1], out.astype(np.float64), out.swapaxes(1, 2)):
        found = verify.check(shape, "float32", inputs, wrong, None)
        assert found.failure.startswith("expected (3, 40, 4, 5) float32, got ")
        assert np.isnan(found.error)


def test_rows_of_the_reference_are_rows_of_the_whole():
    # What the oracle gets for a few rows, a part of the keys, gives what it gives for all rows.
    for shape in (make_shape(), make_shape(keys=7), make_shape(causal=False)):
        inputs = tensors.make_inputs(shape, "float64", use_torch=False)
        whole = verify.exact.attention(*inputs, causal=shape.causal)
        for rows in verify._rows(shape):
            assert verify._oracle_error(shape, inputs, whole, 2, rows) < 1e-14


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 0, 3, 7), (2, 0, 2, 4)])
def test_sequences_of_their_own_lengths(place):
    shape = DecodeShape(
        "a", head_dim=8, dtypes=("float32",), batch=3, heads=4, kv_heads=2, lengths=(5, 11, 8)
    )
    inputs = tensors.make_inputs(shape, "float32", use_torch=False)
    out = np.concatenate(
        [
            verify.exact.attention(inputs.q[[entry]], inputs.k[[entry], :length], inputs.v[[entry], :length])
            for entry, length in enumerate(shape.lengths)
        ]
    ).astype(np.float32)
    assert verify.check(shape, "float32", inputs, out, None).failure == ""
    out[place] = np.nan
    assert verify.check(shape, "float32", inputs, out, None).failure != ""


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_inputs_are_the_same_in_numpy_and_torch(dtype):
    torch = pytest.importorskip("torch")
    if tensors.numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")
    shape = make_shape(dtype)
    ours = tensors.make_inputs(shape, dtype, use_torch=False)
    theirs = tensors.make_inputs(shape, dtype, use_torch=True)
    for array, tensor in zip(ours, theirs, strict=True):
        assert tensor.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(tensors.to_float64(array), tensors.to_float64(tensor))


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setattr(tensors, "find_spec", lambda _name: None)
    assert tensors.numpy_dtype("bfloat16") is None
    with pytest.raises(ValueError, match="ml_dtypes"):
        tensors.make_inputs(make_shape("bfloat16"), "bfloat16", use_torch=False)
