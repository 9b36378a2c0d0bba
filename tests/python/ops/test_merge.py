"""`merge_attention`: attention over a union of key sets from attention over each."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

import subquad
from subquad import reference
from subquad.testing import FLOORS, SPACING, assert_close, lse_floor, naive_attention


@pytest.fixture(params=("numpy", "torch", "jax", "dlpack"))
def library(request):
    """Every kind of array."""
    return request.param


@pytest.fixture
def merge(library, convert):
    """Merges NumPy arrays as arrays of the library; returns NumPy arrays."""

    def merge(outs, lses):
        outs, lses = ([convert(library, x) for x in arrays] for arrays in (outs, lses))
        results = subquad.merge_attention(outs, lses)
        if library != "dlpack":
            assert all(type(x) is type(outs[0]) for x in results)
        if isinstance(results[0], torch.Tensor):
            return tuple(
                x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                if x.dtype == torch.bfloat16
                else x.numpy()
                for x in results
            )
        return tuple(np.asarray(x) for x in results)

    return merge


def exact_merge(outs, lses):
    """The definition, in float64, on numbers."""
    outs, lses = (np.stack([x.astype(np.float64) for x in arrays]) for arrays in (outs, lses))
    top = lses.max(axis=0)
    base = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        lse = base + np.log(np.exp(lses - base).sum(axis=0))
    weights = np.where(np.isneginf(lses), 0.0, np.exp(lses - np.where(np.isneginf(lse), 0.0, lse)))
    weights = np.moveaxis(weights, 2, 3)[..., None]
    return np.where(weights == 0.0, 0.0, weights * np.where(weights == 0.0, 0.0, outs)).sum(axis=0), lse


def parts_of(dtype, draw, count):
    """Random results with log-sum-exps of different sizes."""
    accumulator = "float64" if dtype == "float64" else "float32"
    outs = [draw(dtype, 2, 3, 4, 20) for _ in range(count)]
    return outs, [draw(accumulator, 2, 4, 3, width=5) for _ in range(count)]


def check(merged, outs, lses):
    """Checks a merged result to one rounding of what it is stored as, and of its weights in float64."""
    dtype = str(outs[0].dtype)
    expected, expected_lse = exact_merge(outs, lses)
    out, lse = merged
    assert (out.dtype, lse.dtype) == (outs[0].dtype, lses[0].dtype)
    largest = float(np.max(np.abs(expected_lse), where=np.isfinite(expected_lse), initial=0.0))
    largest_out = float(np.max(np.abs(expected), initial=0.0))
    floor = (SPACING[dtype] + 2 * SPACING["float64"] * (1 + largest)) * largest_out
    assert_close(out, expected, naive=expected, dtype=dtype, floor=floor, name="out")
    floor = SPACING["float64" if dtype == "float64" else "float32"] * (1 + largest)
    assert_close(lse, expected_lse, naive=expected_lse, dtype=dtype, floor=floor, name="lse")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_numbers_of_parts(count, dtype, draw, merge):
    outs, lses = parts_of(dtype, draw, count)
    merged = merge(outs, lses)
    check(merged, outs, lses)
    if count == 1:
        np.testing.assert_array_equal(merged[0], outs[0])
        np.testing.assert_array_equal(merged[1], lses[0])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_over_no_key_count_for_nothing(count, dtype, draw, merge):
    outs, lses = parts_of(dtype, draw, count)
    for i in range(count):
        outs[i][0, :, i % 4], lses[i][0, i % 4] = (np.nan, np.inf, -np.inf, 7.0, np.nan)[i], -np.inf
    # And for one query there is no part with keys.
    for out, lse in zip(outs, lses, strict=True):
        out[1, 2, 1], lse[1, 1, 2] = np.nan, -np.inf
    merged = merge(outs, lses)
    check(merged, outs, lses)
    assert np.isfinite(merged[0].astype(np.float64)).all()
    assert not merged[0][1, 2, 1].any()
    assert np.isneginf(merged[1][1, 1, 2])


def test_all_parts_over_no_key(dtype, draw, merge):
    outs, lses = parts_of(dtype, draw, 3)
    for out, lse in zip(outs, lses, strict=True):
        out[...], lse[...] = np.nan, -np.inf
    out, lse = merge(outs, lses)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_nan_in_a_part_that_counts_is_kept(dtype, draw, merge):
    outs, lses = parts_of(dtype, draw, 2)
    outs[1][0, 1, 2, 3] = np.nan
    out, _ = merge(outs, lses)
    assert np.argwhere(np.isnan(out.astype(np.float64))).tolist() == [[0, 1, 2, 3]]


def test_log_sum_exps_of_any_size(draw, merge):
    outs, lses = parts_of("float32", draw, 2)
    # Far beyond what can be exponentiated.
    for shift in (-3000.0, 0.0, 3000.0):
        moved = [x + np.float32(shift) for x in lses]
        check(merge(outs, moved), outs, moved)
    far = [lses[0], lses[1] - np.float32(1000)]
    np.testing.assert_array_equal(merge(outs, far)[0], outs[0])


@pytest.mark.parametrize("of", ["transposed", "broadcast", "every second", "backwards"])
def test_arrays_of_every_stride(of, library, dtype, draw, merge):
    if of == "backwards" and library == "torch":
        pytest.skip("PyTorch has no such tensors")
    if of != "broadcast" and library == "dlpack" and dtype == "bfloat16":
        pytest.skip("what has to be copied is copied by NumPy, which imports no bfloat16")
    outs, lses = parts_of(dtype, draw, 2)
    if of == "broadcast":
        lses[0] = np.broadcast_to(lses[0][:, :1], lses[0].shape)
        outs[1] = np.broadcast_to(outs[1][:1], outs[1].shape)
        if library == "dlpack":
            pytest.skip("NumPy does not export read-only arrays everywhere")
        for i, arrays in enumerate((lses, outs)):
            view = arrays[i]
            arrays[i] = np.lib.stride_tricks.as_strided(
                view.base if view.base is not None else view, view.shape, view.strides
            )
    changes = {
        "transposed": lambda x: np.ascontiguousarray(x.swapaxes(1, -1)).swapaxes(1, -1),
        "broadcast": lambda x: x,
        "every second": lambda x: np.repeat(np.repeat(x, 2, axis=1), 2, axis=-1)[:, ::2, ..., ::2],
        "backwards": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    }
    strided = [[changes[of](x) for x in arrays] for arrays in (outs, lses)]
    plain = subquad.merge_attention(
        [np.ascontiguousarray(x) for x in outs], [np.ascontiguousarray(x) for x in lses]
    )
    for got, expected in zip(merge(*strided), plain, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bounds", [(0, 90), (0, 1, 90), (0, 0, 13, 64, 89, 90)], ids=str)
def test_key_sets_merge_into_the_whole(bounds, dtype, draw):
    q, k, v = draw(dtype, 2, 5, 4, 32), draw(dtype, 2, 90, 2, 32), draw(dtype, 2, 90, 2, 20)
    outs, lses = zip(
        *(
            subquad.attention(q, k[:, start:end], v[:, start:end], return_lse=True)
            for start, end in itertools.pairwise(bounds)
        ),
        strict=True,
    )
    out, lse = subquad.merge_attention(outs, lses)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    naive, naive_lse = naive_attention(q, k, v, dtype=dtype)
    # The parts were rounded once more.
    largest = float(np.max(np.abs(v.astype(np.float64))))
    floor = 2 * FLOORS[dtype] * SPACING[dtype] * largest
    assert_close(out, expected, naive=naive, dtype=dtype, floor=floor)
    assert_close(lse, expected_lse, naive=naive_lse, dtype=dtype, floor=lse_floor(expected_lse, dtype))


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)], ids=str)
def test_empty_results(shape, merge):
    outs = [np.zeros(shape, np.float32)] * 2
    lses = [np.zeros((shape[0], shape[2], shape[1]), np.float32)] * 2
    out, lse = merge(outs, lses)
    assert out.shape == shape
    assert lse.shape == lses[0].shape
    np.testing.assert_allclose(lse, np.log(2.0), rtol=1e-6)


def test_inputs_are_left_as_they_were_and_not_returned(draw):
    outs, lses = parts_of("float32", draw, 1)
    kept = outs[0].copy(), lses[0].copy()
    out, lse = subquad.merge_attention(tuple(outs), iter(lses))
    assert not np.shares_memory(out, outs[0])
    assert not np.shares_memory(lse, lses[0])
    out[...], lse[...] = 0, 0
    np.testing.assert_array_equal(outs[0], kept[0])
    np.testing.assert_array_equal(lses[0], kept[1])


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


OUT, LSE = zeros(2, 3, 4, 8), zeros(2, 4, 3)
F64 = np.float64
CASES = {
    "nothing": ([], [], ValueError, "lses: "),
    "fewer lses": ([OUT, OUT], [LSE], ValueError, "lses: .*2 and 1"),
    "fewer outs": ([OUT], [LSE, LSE], ValueError, "lses: .*1 and 2"),
    "outs of two shapes": ([OUT, zeros(2, 3, 4, 9)], [LSE, LSE], ValueError, r"outs: .*\(2, 3, 4, 9\)"),
    "outs of rank 3": ([OUT[0]], [LSE], ValueError, "outs: "),
    "lses of rank 4": ([OUT], [LSE[..., None]], ValueError, r"lses: .*\(2, 4, 3, 1\)"),
    "lses in the order of outs": ([OUT], [zeros(2, 3, 4)], ValueError, r"lses: .*\(2, 4, 3\).*\(2, 3, 4\)"),
    "second lse of another shape": ([OUT, OUT], [LSE, zeros(2, 4, 2)], ValueError, "lses: "),
    "outs of two dtypes": ([OUT, OUT.astype(F64)], [LSE, LSE], TypeError, "outs: .*float64"),
    "integer outs": ([OUT.astype(np.int32)], [LSE], TypeError, "outs: .*int32"),
    "lses of twice the precision": ([OUT], [LSE.astype(F64)], TypeError, "lses: .*float32.*float64"),
    "lses of half the precision": ([OUT.astype(F64)], [LSE], TypeError, "lses: .*float64.*float32"),
    "lses of the outs' dtype": (
        [OUT.astype("f2")],
        [LSE.astype("f2")],
        TypeError,
        "lses: .*float32.*float16",
    ),
    "integer lses": ([OUT], [LSE.astype(np.int64)], TypeError, "lses: .*int64"),
    "outs of two libraries": ([OUT, torch.zeros(2, 3, 4, 8)], [LSE, LSE], TypeError, "outs: "),
    "lses of another library": ([OUT], [torch.zeros(2, 4, 3)], TypeError, "lses: "),
    "outs that are no arrays": ([3.0], [LSE], TypeError, "outs: .*float"),
    "lses that are no arrays": ([OUT], [None], TypeError, "lses: .*None"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    outs, lses, exception, pattern = CASES[case]
    with pytest.raises(exception, match=pattern):
        subquad.merge_attention(outs, lses)


def test_gradients_are_refused():
    out, lse = torch.zeros(2, 3, 4, 8, requires_grad=True), torch.zeros(2, 4, 3)
    with pytest.raises(NotImplementedError, match=r"outs: .*grad"):
        subquad.merge_attention([out], [lse])
    with torch.no_grad():
        subquad.merge_attention([out], [lse])
