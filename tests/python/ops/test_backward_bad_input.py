"""What `attention_backward` refuses: by which exception, naming what."""

import ml_dtypes
import numpy as np
import pytest
import torch

import subquad
from subquad import masks
from subquad.normalizers import Sigmoid


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


GOOD = {
    "do": ones(2, 3, 4, 6),
    "q": ones(2, 3, 4, 8),
    "k": ones(2, 5, 2, 8),
    "v": ones(2, 5, 2, 6),
    "out": ones(2, 3, 4, 6),
    "lse": ones(2, 4, 3),
    "dlse": ones(2, 4, 3),
}
SHAPES = {
    "do": [(2, 3, 4, 8), (2, 3, 2, 6), (3, 3, 4, 6), (2, 4, 4, 6), (3, 4, 6), (1, 3, 4, 6)],
    "q": [(2, 3, 4, 7), (2, 3, 3, 8), (1, 3, 4, 8), (3, 4, 8)],
    "k": [(2, 5, 2, 7), (2, 6, 2, 8), (2, 5, 3, 8), (5, 2, 8)],
    "v": [(2, 6, 2, 6), (1, 5, 2, 6), (2, 5, 4, 6), (2, 5, 2)],
    "out": [(2, 3, 4, 8), (2, 3, 2, 6), (3, 3, 4, 6), (2, 4, 3, 6), (2, 3, 4, 6, 1), ()],
    "lse": [(2, 3, 4), (2, 4, 4), (2, 4), (2, 4, 3, 1), (1, 4, 3), ()],
    "dlse": [(2, 3, 4), (2, 4, 4), (2, 4), (2, 4, 3, 1), (1, 4, 3), ()],
}
# Options that do not fit: a sample of what `attention` refuses by the same reading.
OPTIONS = {
    "negative window": ({"window_size": (-1, 0)}, ValueError, "window_size: "),
    "mask of another batch": ({"mask": masks.padding([5] * 3)}, ValueError, "lengths: "),
    "matrix as a mask": ({"mask": np.ones((3, 5), bool)}, TypeError, "mask: "),
    "scales of other queries": ({"scale": ones(4)}, ValueError, "scale: "),
    "bias of other keys": ({"bias": ones(3, 4)}, ValueError, "bias: "),
    "bias of another dtype": ({"bias": ones(5, dtype=np.float16)}, TypeError, "bias: "),
    "distances too few": ({"relative_bias": ones(4, 5)}, ValueError, "relative_bias: "),
    "no softcap": ({"softcap": 0.0}, ValueError, "softcap: "),
    "slopes of other heads": ({"alibi_slopes": ones(2)}, ValueError, "alibi_slopes: "),
    "sinks of other heads": ({"sinks": ones(3)}, ValueError, "sinks: "),
    "sinks of another library": ({"sinks": torch.ones(4)}, TypeError, "sinks: "),
    "length scales too few": ({"length_scale": ones(5)}, ValueError, "length_scale: "),
    "class of a normalizer": ({"normalizer": Sigmoid}, TypeError, "normalizer: "),
    "normalizer with sinks": ({"normalizer": Sigmoid(), "sinks": ones(4)}, ValueError, "sinks: "),
}
WRT = {
    "unknown": ({"wrt": ["q", "w"]}, ValueError, r"wrt: .*relative_bias.*w"),
    "what has no gradient": ({"wrt": ["scale"], "scale": ones(3)}, ValueError, r"wrt: .*scale"),
    "an argument of the backward": ({"wrt": ["out"]}, ValueError, r"wrt: .*out"),
    "empty": ({"wrt": [""]}, ValueError, r"wrt: "),
    "twice": ({"wrt": ["q", "v", "q"]}, ValueError, r"wrt: .*once.*q.*twice"),
    **{
        f"{name} is not given": ({"wrt": ["q", name]}, ValueError, rf"wrt: .*given.*{name}")
        for name in ("bias", "relative_bias", "alibi_slopes", "sinks")
    },
    "boolean bias": ({"wrt": ["bias"], "bias": ones(3, 5, dtype=bool)}, TypeError, r"bias: .*bool"),
    "numbers": ({"wrt": [1]}, TypeError, None),
    "nothing to iterate": ({"wrt": 1}, TypeError, None),
}


def call(**changed):
    given = {**GOOD, **changed}
    arrays = [given.pop(name) for name in ("do", "q", "k", "v", "out", "lse")]
    return subquad.attention_backward(*arrays, **given)


def test_what_is_almost_refused_is_accepted():
    assert [x.shape for x in call()] == [GOOD[name].shape for name in "qkv"]
    assert call(wrt=()) == ()
    assert len(call(dlse=None, wrt=("q",))) == 1


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in SHAPES for shape in SHAPES[name]])
def test_shapes(name, shape):
    with pytest.raises(ValueError, match=r"^(do|q|k|v|out|lse|dlse): "):
        call(**{name: ones(*shape)})


@pytest.mark.parametrize("name", ["do", "out", "lse", "dlse"])
def test_shapes_are_named(name):
    with pytest.raises(ValueError, match=rf"^{name}: .*\(7, 7, 7\)"):
        call(**{name: ones(7, 7, 7)})


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int32, np.complex64, bool])
@pytest.mark.parametrize("name", GOOD)
def test_dtypes(name, dtype):
    # The first array that differs from q is named.
    named = "(k|q)" if name == "q" else name
    with pytest.raises(TypeError, match=rf"^{named}: "):
        call(**{name: GOOD[name].astype(dtype)})


def test_the_lse_of_half_types_is_float32():
    half = {name: x.astype(np.float16) for name, x in GOOD.items() if "lse" not in name}
    assert len(call(**half)) == 3
    for name in ("lse", "dlse"):
        with pytest.raises(TypeError, match=rf"^{name}: .*float32.*float16"):
            call(**half, **{name: GOOD[name].astype(np.float16)})


@pytest.mark.parametrize("other", [None, 1.5, "q", [[1.0]], torch.ones(2, 3, 4, 6)], ids=repr)
@pytest.mark.parametrize("name", GOOD)
def test_what_is_no_array_of_the_library(name, other):
    if name == "dlse" and other is None:
        pytest.skip("the default")
    # With q of another library it is the next array that is named.
    named = "(k|q)" if name == "q" else name
    with pytest.raises((TypeError, ValueError), match=rf"^{named}: "):
        call(**{name: other})


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    options, exception, pattern = OPTIONS[case]
    with pytest.raises(exception, match=f"^{pattern}"):
        call(**options)


@pytest.mark.parametrize("case", WRT)
def test_wrt(case):
    options, exception, pattern = WRT[case]
    with pytest.raises(exception, match=pattern):
        call(**options)


@pytest.mark.parametrize("name", GOOD)
def test_tensors_that_require_grad(name):
    tensors = {key: torch.from_numpy(x) for key, x in GOOD.items()}
    tensors[name] = tensors[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"^{name}: .*grad"):
        call(**tensors)
    with torch.no_grad():
        assert not any(x.requires_grad for x in call(**tensors))


def test_other_devices():
    for name in GOOD:
        tensors = {key: torch.from_numpy(x) for key, x in GOOD.items()}
        tensors[name] = tensors[name].to("meta")
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
            call(**tensors)


def test_positional_and_unknown_arguments():
    arrays = [GOOD[name] for name in ("do", "q", "k", "v", "out", "lse")]
    with pytest.raises(TypeError):
        subquad.attention_backward(*arrays, GOOD["dlse"])
    with pytest.raises(TypeError, match="dropout"):
        subquad.attention_backward(*arrays, dropout=0.1)
