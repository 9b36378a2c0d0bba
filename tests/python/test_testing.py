"""The tolerance rule accepts what it should, and refuses everything else."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from subquad import masks, normalizers, reference
from subquad.testing import (
    FLOORS,
    SPACING,
    assert_close,
    gradient_floors,
    lse_floor,
    naive_attention,
    naive_attention_backward,
    naive_scaled_dot_product_attention,
    round_to,
)

EXPECTED = np.linspace(-2, 2, 24).reshape(2, 3, 4)
NAIVE = EXPECTED.copy()
NAIVE[1, 0, 2] += 1e-3
FLOOR = FLOORS["float32"] * SPACING["float32"] * 2


def off_by(error):
    """Returns the expected values with one that is off."""
    actual = EXPECTED.copy()
    actual[0, 2, 1] += error
    return actual


def check(actual, **options):
    """Checks against `EXPECTED`."""
    assert_close(actual, EXPECTED, **{"naive": NAIVE, "dtype": "float32", **options})


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit(gradient, sign):
    limit = (3 if gradient else 2) * 1e-3 + FLOOR
    check(off_by(sign * limit * 0.999), gradient=gradient)
    with pytest.raises(AssertionError):
        check(off_by(sign * limit * 1.001), gradient=gradient)


@pytest.mark.parametrize("dtype", SPACING)
def test_the_floor_depends_on_the_dtype(dtype):
    floor = FLOORS[dtype] * SPACING[dtype] * 2
    # Between the two factors there is room for the rounding of the sum that `off_by` forms.
    check(off_by(floor * 0.9), naive=EXPECTED, dtype=dtype)
    with pytest.raises(AssertionError, match=dtype):
        check(off_by(floor * 1.1), naive=EXPECTED, dtype=dtype)


def test_a_floor_that_is_given_replaces_the_default():
    check(off_by(0.49), naive=EXPECTED, floor=0.5)
    with pytest.raises(AssertionError):
        check(off_by(1e-9), naive=EXPECTED, floor=0.0)


def test_the_message_says_it_all():
    with pytest.raises(AssertionError) as caught:
        check(off_by(0.25), name="dq")
    message = str(caught.value)
    assert message.startswith("dq: error 2.500e-01 at index (0, 2, 1) exceeds the limit 2.001e-03: ")
    assert f"actual {np.float64(EXPECTED[0, 2, 1] + 0.25)!r}" in message
    assert f"expected {np.float64(EXPECTED[0, 2, 1])!r}" in message
    assert (
        "limit = 2 * naive error 1.000e-03 + floor 9.537e-07 (float32); 1 of 24 elements exceed it" in message
    )


def test_the_worst_element_is_named():
    actual = off_by(0.25)
    actual[1, 1, 1] -= 0.5
    with pytest.raises(AssertionError, match=re.escape("at index (1, 1, 1)")):
        check(actual)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(np.nan, 1), (np.inf, 1), (1, np.nan), (1, np.inf), (-np.inf, np.inf), (np.inf, np.nan)],
)
def test_non_finite_values_must_agree(actual, expected):
    got, oracle = EXPECTED.copy(), EXPECTED.copy()
    got[1, 2, 3], oracle[1, 2, 3] = actual, expected
    with pytest.raises(
        AssertionError, match=r"non-finite values differ at index \(1, 2, 3\): .*\(1 of 24 elements\)"
    ):
        assert_close(got, oracle, naive=NAIVE, dtype="float32", floor=10.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_that_agree_are_fine(value):
    got, oracle = EXPECTED.copy(), EXPECTED.copy()
    got[1, 2, 3] = oracle[1, 2, 3] = value
    assert_close(got, oracle, naive=NAIVE, dtype="float32")
    # They are no measure of other places either.
    got[0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_close(got, oracle, naive=NAIVE, dtype="float32")


def test_a_naive_result_without_numbers_gives_no_room():
    naive = NAIVE.copy()
    naive[1, 0, 2] = np.nan
    with pytest.raises(AssertionError, match=r"naive error 0\.000e\+00"):
        check(off_by(1e-3), naive=naive)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"expected shape \(2, 3, 4\), got \(2, 3, 1\)"):
        check(EXPECTED[..., :1])
    with pytest.raises(AssertionError, match="expected shape"):
        check(EXPECTED[None])


@pytest.mark.parametrize(
    "options",
    [{"naive": EXPECTED[0]}, {"naive": 0 * EXPECTED}, {"floor": np.inf}, {"floor": np.nan}, {"floor": -1.0}],
    ids=str,
)
def test_vacuous_checks_are_refused(options):
    with pytest.raises(ValueError, match=r"^(naive|floor): expected"):
        check(EXPECTED, **options)


def test_unknown_dtypes_are_refused():
    with pytest.raises(KeyError):
        check(EXPECTED, dtype="float8")


def test_the_environment_changes_nothing(monkeypatch):
    for name in ("SUBQUAD_TOLERANCE", "SUBQUAD_RTOL", "SUBQUAD_ATOL", "SUBQUAD_TESTING_FACTOR"):
        monkeypatch.setenv(name, "1000")
    with pytest.raises(AssertionError):
        check(off_by(0.01))


def test_empty_arrays_are_close():
    empty = np.zeros((0, 3))
    assert_close(empty, empty, naive=empty, dtype="float32")


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda x: x.astype(np.float32), "float32"),
        (lambda x: x.astype(ml_dtypes.bfloat16), "bfloat16"),
        (torch.from_numpy, "float64"),
        (lambda x: torch.from_numpy(x).bfloat16(), "bfloat16"),
        (lambda x: torch.from_numpy(x).half().requires_grad_(), "float16"),
        (lambda x: jax.numpy.asarray(x, jax.numpy.float32), "float32"),
        (lambda x: jax.numpy.asarray(x, jax.numpy.bfloat16), "bfloat16"),
    ],
)
def test_arrays_of_every_library(convert, dtype):
    spacing = SPACING[dtype]
    assert_close(convert(EXPECTED), EXPECTED, naive=EXPECTED)
    wrong = EXPECTED.copy()
    wrong[1, 2, 3] += 8 * spacing
    with pytest.raises(AssertionError, match=dtype):
        assert_close(convert(wrong), EXPECTED, naive=convert(EXPECTED), floor=4 * spacing)


@pytest.mark.parametrize("dtype", SPACING)
def test_spacing(dtype):
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    assert ml_dtypes.finfo(kind).eps == SPACING[dtype]


def test_lse_floor():
    assert lse_floor(np.array([-np.inf, 3.0]), "float32") == 16 * 2.0**-23
    assert lse_floor(np.array([-np.inf]), "float64") == 4 * 2.0**-52
    assert lse_floor(np.array([-3.0]), "bfloat16") == 16 * 2.0**-23 + 2.0**-13
    assert lse_floor(np.array([0.0]), "float16") == 4 * 2.0**-23 + 2.0**-16


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_to_bfloat16_is_that_of_ml_dtypes(dtype):
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    # All kinds of numbers, ties among them.
    bits = np.concatenate(
        [bits, (bits & 0xFFFF0000) | 0x8000, [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0, 1 << 31, 1]]
    )
    values = bits.astype(np.uint32).view(np.float32)
    # Some of them are signalling NaN.
    with np.errstate(invalid="ignore"):
        rounded = round_to(values.astype(dtype), "bfloat16")
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, expected)


def test_rounding_to_other_dtypes():
    values = np.array([1 + 2.0**-12, 70_000.0, 1e-9], np.float32)
    np.testing.assert_array_equal(round_to(values, "float16"), [1, np.inf, 0])
    np.testing.assert_array_equal(round_to(values, "float32"), values)


def test_the_naive_formula_is_the_oracles(dtype, draw):
    q, k, v = draw(dtype, 2, 9, 4, 8), draw(dtype, 2, 14, 2, 8), draw(dtype, 2, 14, 2, 6)
    for options in (
        {},
        {"causal": True},
        {"scale": -0.7},
        {"bias": np.random.default_rng(0).random((4, 9, 14)) > 0.5},
        {"bias": draw("float32", 2, 1, 1, 14), "causal": True},
        {"window_size": (3, 1), "mask": masks.chunked(4) | masks.prefix([1, 3])},
        {"window_size": np.array([[0, 2], [3, -1], [-1, 0], [5, 5]]), "causal": True},
        {"scale": draw("float32", 4, 9), "length_scale": draw("float32", 15), "causal": True},
        {"softcap": 1.5, "alibi_slopes": draw("float32", 4), "relative_bias": draw("float32", 4, 22)},
        {"sinks": draw("float32", 4), "window_size": (0, 0)},
        {"normalizer": normalizers.Sigmoid(-1.0)},
        {"normalizer": normalizers.Softplus(), "causal": True},
        {"normalizer": normalizers.ReLU(2), "scale": 1.0},
        {"normalizer": normalizers.Power(2), "alibi_slopes": draw("float32", 2, 4)},
    ):
        out, lse = naive_attention(q, k, v, dtype=dtype, **options)
        expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
        tolerance = 16 * SPACING[dtype]
        np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
        # It is rounded to the dtype, and to nothing coarser.
        np.testing.assert_array_equal(out, round_to(out, dtype))
    assert dtype == "float64" or (out != expected).any()


def test_the_naive_gradients_are_the_oracles(dtype, draw):
    do, q = draw(dtype, 2, 9, 4, 6), draw(dtype, 2, 9, 4, 8)
    k, v = draw(dtype, 2, 14, 2, 8), draw(dtype, 2, 14, 2, 6)
    accumulator = "float64" if dtype == "float64" else "float32"
    dlse = draw(accumulator, 2, 4, 9)
    every = {
        "causal": True,
        "bias": draw(accumulator, 1, 4, 1, 14),
        "relative_bias": draw(dtype, 4, 22),
        "alibi_slopes": draw("float32", 2, 4),
        "sinks": draw(accumulator, 4, 9),
        "softcap": 2.0,
    }
    for options in ({}, every, {"normalizer": normalizers.Softplus(), "scale": draw("float32", 4, 9)}):
        wrt = ("q", "k", "v", *(name for name in every if hasattr(options.get(name), "dtype")))
        results = reference.attention(q, k, v, return_lse=True, **options)
        expected = reference.attention_backward(do, q, k, v, *results, dlse=dlse, wrt=wrt, **options)
        found = naive_attention_backward(do, q, k, v, dtype=dtype, dlse=dlse, wrt=wrt, **options)
        floors = gradient_floors(expected, do, q, k, v, *results, dtype=dtype, dlse=dlse, wrt=wrt, **options)
        for name, x, y, floor in zip(wrt, found, expected, floors, strict=True):
            largest = np.abs(y).max()
            own = str(options[name].dtype) if name in options else dtype
            np.testing.assert_allclose(x, y, rtol=0, atol=32 * max(SPACING[dtype], SPACING[own]) * largest)
            np.testing.assert_array_equal(x, round_to(x, own))
            assert floor > FLOORS[own] * SPACING[own] * largest


def test_floors_of_gradients_that_cancel():
    # One key: its weight is 1, whatever the scores.
    do, q, k, v = (np.full((1, 1, 1, n), x, np.float32) for n, x in ((2, 3.0), (1, 5.0), (1, 7.0), (2, 2.0)))
    results = reference.attention(q, k, v, scale=1.0, return_lse=True)
    gradients = reference.attention_backward(do, q, k, v, *results, scale=1.0)
    floors = gradient_floors(gradients, do, q, k, v, *results, dtype="float32", scale=1.0)
    spacing = SPACING["float32"]
    rounding = spacing * (1 + 35)
    # `do v^T` and `do out` are 12.
    d_score = 12 * rounding + 12 * (rounding + spacing / 2)
    expected = [7 * d_score, 5 * d_score, 4 * spacing * 3 + 3 * rounding]
    np.testing.assert_allclose(floors, expected, rtol=1e-12)
    assert [x.max() for x in gradients] == [0, 0, 3]


def test_a_naive_formula_within_the_floor_is_no_vacuous_check():
    zero = np.zeros(3)
    assert_close(zero, zero, naive=zero + 1e-7, dtype="float32", floor=1e-6)
    with pytest.raises(ValueError, match="naive"):
        assert_close(zero, zero, naive=zero + 1e-5, dtype="float32", floor=1e-6)


def test_the_naive_formula_of_sdpa_is_the_oracles(dtype, draw):
    query, key, value = draw(dtype, 3, 2, 4, 9, 8), draw(dtype, 2, 2, 14, 8), draw(dtype, 1, 2, 14, 6)
    for options in ({}, {"is_causal": True}, {"attn_mask": np.random.default_rng(0).random((9, 14)) > 0.5}):
        out = naive_scaled_dot_product_attention(query, key, value, dtype=dtype, enable_gqa=True, **options)
        expected = reference.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        tolerance = 16 * SPACING[dtype]
        np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_the_naive_formula_of_blind_queries_is_zero(draw):
    q, k = draw("float32", 1, 4, 1, 8), draw("float32", 1, 2, 1, 8)
    out, lse = naive_attention(q, k, k, dtype="float32", causal=True)
    assert (out[:, :2] == 0).all()
    assert np.isneginf(lse[:, :, :2]).all()


def test_accumulation_is_in_float32(draw):
    # In bfloat16 a sum of 4,000 ones would end at 256.
    q, k = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 4000, 1, 1), np.float32)
    out, lse = naive_attention(q, k, k + 1, dtype="bfloat16")
    assert out.item() == 1
    assert lse.item() == pytest.approx(np.log(4000), rel=1e-6)
