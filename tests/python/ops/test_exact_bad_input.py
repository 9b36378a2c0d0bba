"""What `attention` refuses of windows, masks, modifiers and normalizers: by which exception, naming what."""

import numpy as np
import pytest
import torch

import subquad
from subquad import masks
from subquad.masks import document, padding, prefix
from subquad.normalizers import ReLU, Sigmoid, Softplus


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


# Of a call with q `[2, 3, 4, 8]`, k `[2, 5, 2, 8]`, v `[2, 5, 2, 6]`: the options, the exception, and its message.
BAD = {
    # Windows.
    "negative left": ({"window_size": (-1, 0)}, ValueError, r"window_size: .*-1"),
    "negative right": ({"window_size": (3, -2)}, ValueError, r"window_size: .*-2"),
    "negative in pairs": ({"window_size": [(1, 0)] * 3 + [(1, -1)]}, ValueError, r"window_size: .*-1"),
    "below -1 in an array": ({"window_size": np.full((4, 2), -2)}, ValueError, r"window_size: .*-2"),
    "one side": ({"window_size": 5}, TypeError, r"window_size: .*\b5$"),
    "three sides": ({"window_size": (1, 2, 3)}, TypeError, r"window_size: .*\(1, 2, 3\)$"),
    "no sides": ({"window_size": ()}, TypeError, r"window_size: "),
    "fractions": ({"window_size": (1.5, 0)}, TypeError, r"window_size: "),
    "booleans": ({"window_size": (True, False)}, TypeError, r"window_size: "),
    "text": ({"window_size": "10"}, TypeError, r"window_size: "),
    "too few pairs": ({"window_size": [(1, 0)] * 3}, ValueError, r"window_size: .*\b4\b.*\b3\b"),
    "pairs of three": ({"window_size": [(1, 0, 0)] * 4}, TypeError, r"window_size: "),
    "array of another shape": (
        {"window_size": zeros(2, 4, dtype=int)},
        ValueError,
        r"window_size: .*\(2, 4\)",
    ),
    "array of one pair": ({"window_size": np.array([1, 0])}, ValueError, r"window_size: .*\(2,\)"),
    "array of numbers": ({"window_size": zeros(4, 2)}, TypeError, r"window_size: .*float32"),
    # Masks.
    "class of a mask": ({"mask": masks.causal}, TypeError, r"mask: "),
    "matrix": ({"mask": np.ones((3, 5), bool)}, TypeError, r"mask: .*(ndarray|NumPy)"),
    "name of a mask": ({"mask": "causal"}, TypeError, r"mask: "),
    "prefix of another batch": ({"mask": prefix([1, 2, 3])}, ValueError, r"lengths: .*\b2\b.*\b3\b"),
    "padding of another batch": ({"mask": padding([5] * 3)}, ValueError, r"lengths: .*\b2\b.*\b3\b"),
    "left padding of another batch": ({"mask": padding(5, [0] * 3)}, ValueError, r"leftpad: .*\b2\b.*\b3\b"),
    "documents of other queries": (
        {"mask": document([1] * 4, [1] * 5)},
        ValueError,
        r"\bids: .*\b3\b.*\b4\b",
    ),
    "documents of other keys": ({"mask": document([1] * 3, [1] * 4)}, ValueError, r"key_ids: .*\b5\b.*\b4\b"),
    "documents without keys": ({"mask": document([1] * 3)}, ValueError, r"\bids: .*\b5\b.*\b3\b"),
    "documents of another batch": (
        {"mask": document(zeros(3, 3, dtype=int), [1] * 5)},
        ValueError,
        r"\bids: .*\b2\b.*\(?3",
    ),
    "wrong part": (
        {"mask": masks.causal() & (prefix([1] * 3) | padding(5))},
        ValueError,
        r"lengths: .*\b3\b",
    ),
    # Scales.
    "scales of other queries": ({"scale": zeros(4)}, ValueError, r"scale: .*\(4,\)"),
    "scales of rank 4": ({"scale": zeros(2, 4, 3, 1)}, ValueError, r"scale: .*\(2, 4, 3, 1\)"),
    "integer scales": ({"scale": zeros(3, dtype=np.int64)}, TypeError, r"scale: .*int64"),
    "scale in words": ({"scale": "1"}, TypeError, r"scale: .*str"),
    "scales of another library": ({"scale": torch.zeros(3)}, TypeError, r"scale: "),
    "length scales too few": ({"length_scale": zeros(5)}, ValueError, r"length_scale: .*\(6,\).*\(5,\)"),
    "length scales of rank 2": ({"length_scale": zeros(1, 6)}, ValueError, r"length_scale: .*\(1, 6\)"),
    "integer length scales": ({"length_scale": zeros(6, dtype=int)}, TypeError, r"length_scale: .*int64"),
    "length scale in a list": ({"length_scale": [1.0] * 6}, TypeError, r"length_scale: .*list"),
    # Score modifiers.
    "no softcap": ({"softcap": 0.0}, ValueError, r"softcap: .*\b0"),
    "negative softcap": ({"softcap": -5.0}, ValueError, r"softcap: .*-5"),
    "infinite softcap": ({"softcap": np.inf}, ValueError, r"softcap: .*inf"),
    "softcap without a value": ({"softcap": np.nan}, ValueError, r"softcap: .*[Nn]a[Nn]"),
    "softcap in words": ({"softcap": "5"}, TypeError, r"softcap: .*str|softcap"),
    "slopes of other heads": ({"alibi_slopes": zeros(2)}, ValueError, r"alibi_slopes: .*\(2,\)"),
    "slopes of other sequences": ({"alibi_slopes": zeros(3, 4)}, ValueError, r"alibi_slopes: .*\(3, 4\)"),
    "one slope": ({"alibi_slopes": zeros()}, ValueError, r"alibi_slopes: .*\(\)"),
    "slopes of another dtype": (
        {"alibi_slopes": zeros(4, dtype=np.float16)},
        TypeError,
        r"alibi_slopes: .*float16",
    ),
    "slopes in a list": ({"alibi_slopes": [0.5] * 4}, TypeError, r"alibi_slopes: .*list"),
    "slopes of another library": ({"alibi_slopes": torch.zeros(4)}, TypeError, r"alibi_slopes: "),
    "distances too few": ({"relative_bias": zeros(4, 5)}, ValueError, r"relative_bias: .*\b7\b.*\(4, 5\)"),
    "distances of other heads": ({"relative_bias": zeros(2, 7)}, ValueError, r"relative_bias: .*\(2, 7\)"),
    "distances of rank 1": ({"relative_bias": zeros(7)}, ValueError, r"relative_bias: .*\(7,\)"),
    "boolean distances": ({"relative_bias": zeros(4, 7, dtype=bool)}, TypeError, r"relative_bias: .*bool"),
    "distances of another dtype": (
        {"relative_bias": zeros(4, 7, dtype=np.float64)},
        TypeError,
        r"relative_bias: .*float64",
    ),
    # Sinks and normalizers.
    "sinks of other heads": ({"sinks": zeros(3)}, ValueError, r"sinks: .*\(3,\)"),
    "sinks of key heads": ({"sinks": zeros(2)}, ValueError, r"sinks: .*\(2,\)"),
    "sinks of other queries": ({"sinks": zeros(4, 2)}, ValueError, r"sinks: .*\(4, 2\)"),
    "sinks of rank 4": ({"sinks": zeros(1, 2, 4, 3)}, ValueError, r"sinks: .*\(1, 2, 4, 3\)"),
    "one sink": ({"sinks": zeros()}, ValueError, r"sinks: .*\(\)"),
    "integer sinks": ({"sinks": zeros(4, dtype=np.int32)}, TypeError, r"sinks: .*int32"),
    "sinks of another dtype": ({"sinks": zeros(4, dtype=np.float16)}, TypeError, r"sinks: .*float16"),
    "sinks in a list": ({"sinks": [0.0] * 4}, TypeError, r"sinks: .*list"),
    "sinks of another library": ({"sinks": torch.zeros(4)}, TypeError, r"sinks: "),
    "sigmoid with sinks": ({"sinks": zeros(4), "normalizer": Sigmoid()}, ValueError, r"sinks: .*normalizer"),
    "softplus with sinks": (
        {"sinks": zeros(4), "normalizer": Softplus()},
        ValueError,
        r"sinks: .*normalizer",
    ),
    "class of a normalizer": ({"normalizer": Sigmoid}, TypeError, r"normalizer: "),
    "name of a normalizer": ({"normalizer": "sigmoid"}, TypeError, r"normalizer: "),
    "function": ({"normalizer": np.tanh}, TypeError, r"normalizer: "),
    "mask as a normalizer": ({"normalizer": masks.causal()}, TypeError, r"normalizer: "),
    "normalizer as a mask": ({"mask": ReLU()}, TypeError, r"mask: "),
}
Q, K, V = zeros(2, 3, 4, 8), zeros(2, 5, 2, 8), zeros(2, 5, 2, 6)


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    options, exception, pattern = BAD[case]
    out = np.full((2, 3, 4, 6), 7, np.float32)
    with pytest.raises(exception, match=pattern):
        subquad.attention(Q, K, V, out=out, **options)
    # Nothing was written.
    assert (out == 7).all()


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (0, 0)},
        {"window_size": np.full((4, 2), -1)},
        {"mask": document([1] * 3, [1] * 5) & padding([5, 0], [0, 0])},
        {"scale": zeros(3)},
        {"length_scale": zeros(6)},
        {"softcap": 1e-3},
        {"alibi_slopes": zeros(2, 4)},
        {"relative_bias": zeros(1, 7)},
        {"sinks": zeros(4)},
        {"normalizer": ReLU()},
    ],
    ids=str,
)
def test_what_is_almost_refused_is_accepted(options):
    assert subquad.attention(Q, K, V, **options).shape == (2, 3, 4, 6)


@pytest.mark.parametrize("name", ["scale", "alibi_slopes", "relative_bias", "sinks", "length_scale"])
def test_outputs_in_the_memory_of_an_option(name):
    out = np.zeros((2, 3, 4, 6), np.float32)
    shapes = {
        "scale": (3,),
        "alibi_slopes": (4,),
        "relative_bias": (4, 7),
        "sinks": (4,),
        "length_scale": (6,),
    }
    inside = out.reshape(-1)[: np.prod(shapes[name])].reshape(shapes[name])
    with pytest.raises(ValueError, match=f"out: .*overlaps {name}"):
        subquad.attention(Q, K, V, out=out, **{name: inside})
