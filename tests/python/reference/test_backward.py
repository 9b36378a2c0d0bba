"""The oracle's gradients against finite differences of the oracle, and what is hidden against nothing."""

import numpy as np
import pytest

from subquad import masks, reference
from subquad.normalizers import Power, ReLU, Sigmoid, Softplus

B, SQ, SK, H, HKV, D, DV = 2, 4, 6, 4, 2, 3, 2
STEP = 1e-5
GENERATOR = np.random.default_rng(11)
ARGUMENTS = ("q", "k", "v")
TABLES = ("bias", "relative_bias", "alibi_slopes", "sinks")


def numbers(*shape):
    return GENERATOR.standard_normal(shape)


INPUTS = {"q": numbers(B, SQ, H, D), "k": numbers(B, SK, HKV, D), "v": numbers(B, SK, HKV, DV)}
DO, DLSE = numbers(B, SQ, H, DV), numbers(B, H, SQ)
SHOWN = GENERATOR.random((B, 1, SQ, SK)) > 0.3
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (1, 1)},
    "windows of heads": {"window_size": [(0, 0), (2, None), (None, 1), (1, 0)], "causal": True},
    "mask": {"mask": masks.padding([6, 3]) & (masks.chunked(3) | masks.prefix(1))},
    "scale": {"scale": -0.7},
    "scales": {"scale": numbers(B, H, SQ)},
    "length scale": {"length_scale": numbers(SK + 1), "causal": True},
    "softcap": {"softcap": 0.8, "scale": 1.0},
    "boolean bias": {"bias": SHOWN},
    "bias with -inf": {"bias": np.where(SHOWN, numbers(B, H, SQ, SK), -np.inf)},
    **{
        f"bias {shape}": {"bias": numbers(*shape)}
        for shape in [(H, SQ, SK), (B, 1, SQ, SK), (1, H, 1, SK), (B, H, SQ, 1), (SQ, 1), (SK,), (1,), ()]
    },
    "relative bias": {"relative_bias": numbers(H, SQ + SK - 1)},
    "one relative bias": {"relative_bias": numbers(1, SQ + SK - 1), "causal": True},
    "slopes": {"alibi_slopes": numbers(H)},
    "slopes of sequences": {"alibi_slopes": numbers(B, H), "causal": True},
    **{
        f"sinks {shape}": {"sinks": numbers(*shape), "causal": True}
        for shape in [(H,), (H, 1), (1, SQ), (B, 1, 1), (B, H, SQ)]
    },
    "sinks of blind rows": {"sinks": numbers(H), "mask": masks.padding([0, 6])},
    "no sink": {"sinks": np.array([0.5, -np.inf, 1.0, -np.inf])},
    "everything": {
        "causal": True,
        "window_size": (3, 0),
        "mask": masks.padding([6, 4]),
        "scale": numbers(H, SQ),
        "bias": numbers(H, 1, SK),
        "relative_bias": numbers(H, SQ + SK - 1),
        "softcap": 1.5,
        "alibi_slopes": numbers(B, H),
        "sinks": numbers(H, SQ),
        "length_scale": numbers(SK + 1),
    },
}
NORMALIZERS = [
    Sigmoid(-1.0),
    Softplus(),
    ReLU(),
    ReLU(2),
    ReLU(2.5, normalize=False),
    Power(2),
    Power(1),
    Power(2.5),
]


def check(options, *, uses_lse=True):
    """Checks all gradients along a random direction of each argument, and along some of its axes."""
    arrays = INPUTS | {name: options[name] for name in TABLES if name in options}
    arrays = {name: x for name, x in arrays.items() if x.dtype == np.float64}
    dlse = DLSE if uses_lse else None

    def loss(**changed):
        given = INPUTS | options | changed
        out, lse = reference.attention(**given, return_lse=True)
        seen = np.isfinite(lse)
        return (DO * out).sum() + (np.where(seen, DLSE, 0) * np.where(seen, lse, 0)).sum() * uses_lse

    out, lse = reference.attention(**INPUTS, **options, return_lse=True)
    gradients = reference.attention_backward(
        DO, *INPUTS.values(), out, lse, dlse=dlse, wrt=tuple(arrays), **options
    )
    for (name, x), gradient in zip(arrays.items(), gradients, strict=True):
        assert gradient.shape == x.shape
        assert gradient.dtype == np.float64
        finite = np.isfinite(x)
        assert (gradient[~finite] == 0).all()
        axes = np.eye(x.size)[GENERATOR.choice(x.size, min(x.size, 5), replace=False)]
        directions = np.where(finite, [GENERATOR.standard_normal(x.shape), *axes.reshape(-1, *x.shape)], 0.0)
        for direction in directions:
            ahead, behind = (loss(**{name: x + sign * STEP * direction}) for sign in (1, -1))
            expected = (ahead - behind) / (2 * STEP)
            np.testing.assert_allclose(
                (gradient * direction).sum(), expected, rtol=1e-6, atol=1e-8, err_msg=name
            )


@pytest.mark.parametrize("uses_lse", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_finite_differences(name, uses_lse):
    check(OPTIONS[name], uses_lse=uses_lse)


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 1.2, "bias": numbers(H, SQ, SK)},
        {"relative_bias": numbers(1, SQ + SK - 1), "alibi_slopes": numbers(H), "bias": SHOWN},
    ],
    ids=["plain", "capped", "shifted"],
)
def test_normalizers_are_finite_differences(options, normalizer):
    check(options | {"normalizer": normalizer})


def gradients_of(q, k, v, do, **options):
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    names = (*ARGUMENTS, *(name for name in TABLES if name in options and options[name].dtype != bool))
    return reference.attention_backward(do, q, k, v, out, lse, wrt=names, dlse=DLSE, **options)


@pytest.mark.parametrize("normalizer", [None, *NORMALIZERS], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_has_no_influence(bad, normalizer):
    # The first query sees no key, and no query the last two.
    bias = np.zeros((SQ, SK))
    bias[0], bias[:, -2:] = -np.inf, -np.inf
    options = {"bias": bias, "normalizer": normalizer, "alibi_slopes": numbers(H)}
    if normalizer is None:
        options["sinks"] = numbers(H)
    expected = gradients_of(*INPUTS.values(), DO, **options)
    q, k, v, do = (x.copy() for x in (*INPUTS.values(), DO))
    k[:, -2:], v[:, -2:], q[:, 0], do[:, 0] = bad, bad, bad, bad
    found = gradients_of(q, k, v, do, **options)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    dq, dk, dv, dbias = found[:4]
    for hidden in (dq[:, 0], dk[:, -2:], dv[:, -2:], dbias[np.isneginf(bias)]):
        assert (hidden == 0).all()


def test_visible_nan_propagates():
    for name in (*ARGUMENTS, "do"):
        arrays = {name: x.copy() for name, x in (INPUTS | {"do": DO}).items()}
        arrays[name][0, 2, 1] = np.nan
        dq, dk, dv = gradients_of(**arrays, causal=True)
        assert np.isnan(dq[0]).any()
        assert np.isnan(dk[0]).any()
        assert np.isnan(dv[0]).any() == (name != "v")
        assert np.isfinite([dq[1].sum(), dk[1].sum(), dv[1].sum()]).all()


def test_unknown_names_are_refused():
    with pytest.raises(KeyError):
        reference.attention_backward(DO, *INPUTS.values(), DO, DLSE, wrt=("bias",))
