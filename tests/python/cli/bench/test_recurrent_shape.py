"""Named shapes of recurrent operators, and the count of their work."""

import pytest

from subquad.cli.bench import shape_file
from subquad.cli.bench.recurrent_operators import OPERATORS
from subquad.cli.bench.recurrent_shape import RecurrentShape

SIZES = {"H": 2, "K": 8, "V": 6}
MINIMAL = {"name": "a", "operator": "kda", "sizes": SIZES, "tokens": 40, "dtypes": ["float32"]}
CONVOLUTION = {"operator": "causal_conv1d", "sizes": {"D": 6, "W": 4}}
STEP = {"form": "step", "tokens": 1}


def build(**changes) -> RecurrentShape:
    return shape_file.build(RecurrentShape, {**MINIMAL, **changes})


def test_defaults():
    shape = build()
    assert (shape.tokens, shape.form, shape.bound, shape.held_against) == ((40,), "forward", "arithmetic", "")
    assert shape.calls() == (shape,)
    assert shape.axes("BTHKV") == (1, 40, 2, 8, 6)
    assert build(sizes={**SIZES, "B": 3}).axes("BT") == (3, 40)


@pytest.mark.parametrize(
    ("operator", "sizes", "flops"),
    [
        # For each head 65,536 with the state, and 8,192 of products within a chunk of 32.
        ("linear_attn", {"H": 2, "K": 128, "V": 128}, 2 * (65_536 + 8_192)),
        ("gla", {"H": 1, "K": 8, "V": 6}, 4 * 48 + 32 * 14),
        ("gated_delta_rule", {"H": 2, "K": 128, "V": 128}, 2 * (98_304 + 16_384)),
        ("kda", {"H": 1, "K": 8, "V": 6}, 6 * 48 + 64 * 14),
        ("rwkv7", {"H": 3, "K": 8, "V": 6}, 3 * (8 * 48 + 128 * 14)),
        # Each of two keys reads, solves and writes; the query reads, and has products with keys.
        ("gated_delta_product", {"H": 1, "K": 8, "V": 6}, 2 * (4 * 48 + 32 * 14) + 2 * 48 + 32 * 14),
        # Real and imaginary parts of keys.
        ("gate_loop", {"H": 1, "K": 8, "V": 6}, 4 * 96 + 32 * 22),
        ("gsa", {"H": 1, "K": 8, "V": 6, "M": 4}, 4 * 32 + 32 * 12 + 4 * 24 + 32 * 10),
        # Products of B and C are shared by the heads of a group.
        ("mamba2", {"H": 6, "G": 2, "P": 8, "N": 16}, 6 * (4 * 128 + 32 * 8) + 2 * 32 * 16),
        ("mamba", {"D": 10, "N": 16}, 6 * 160),
        ("causal_conv1d", {"D": 10, "W": 4}, 80),
    ],
)
def test_useful_flops(operator, sizes, flops):
    shape = build(operator=operator, sizes={**sizes, "B": 3}, tokens=7)
    assert shape.useful_flops == 3 * 7 * flops


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_useful_bytes(dtype, item):
    convolution = build(**CONVOLUTION, dtypes=[dtype], tokens=7)
    assert (convolution.bound, convolution.useful_bytes(dtype)) == ("copy", 2 * 6 * 7 * item)
    step = build(**STEP, dtypes=[dtype])
    assert (step.bound, step.useful_bytes(dtype)) == ("update", 2 * 2 * 8 * 6 * max(item, 4))


def test_training_is_held_against_forward_alone():
    shape = build(form="training", limit_ratio=3.5)
    assert (shape.bound, shape.held_against, shape.limit_ratio) == ("", "forward alone", 3.5)


@pytest.mark.parametrize(("against", "kept"), [("lengths", ("", 0.0)), ("attention", ("attention", 1.1))])
def test_a_call_for_each_length(against, kept):
    shape = build(tokens=[40, 20], against=against, limit_ratio=1.1, limit_mib_per_thread=3)
    calls = shape.calls()
    assert [(call.name, call.tokens) for call in calls] == [("a 40", (40,)), ("a 20", (20,))]
    assert {(call.against, call.limit_ratio, call.limit_mib_per_thread) for call in calls} == {(*kept, 3)}


def test_axes_of_every_operator_are_known():
    for name, operator in OPERATORS.items():
        shape = build(operator=name, sizes=dict.fromkeys(operator.letters, 2), tokens=5)
        for axes in (operator.out, *(each.axes for each in operator.inputs.values())):
            assert len(shape.axes(axes)) == len(axes)
        assert shape.useful_flops > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be text"),
        ({"dtypes": []}, "dtypes must not be empty"),
        ({"threads": [0]}, "threads must be a list of whole numbers"),
        ({"operator": "lstm"}, "operator must be one of linear_attn, .*, got 'lstm'"),
        ({"form": "backward"}, "form must be one of forward, training, step, got 'backward'"),
        ({"sizes": {"H": 2}}, r"sizes must give a number for H, K, V \(and B\)"),
        ({"sizes": {**SIZES, "W": 2}}, r"sizes must give a number for H, K, V \(and B\)"),
        ({"sizes": 3}, "sizes must give a number for"),
        ({"sizes": {**SIZES, "B": 0}}, "sizes.B must be a whole number of at least 1, got 0"),
        ({"tokens": []}, "tokens must be a whole number, or a list of several"),
        ({"tokens": [3, 3]}, "none of them twice"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        ({"tokens": 2.0}, "tokens must be a whole number, or a list"),
        ({"form": "step"}, r"tokens must be 1 in form step, got \[40\]"),
        ({**STEP, "operator": "gla"}, "form step needs a state that is updated in place, which gla has not"),
        ({"channels_last": 1}, "channels_last must be true or false"),
        ({"channels_last": True}, r"channels_last needs inputs \[B, D, T\], which kda has not"),
        ({"floor": {"avx3": {"float32": 70}}}, "floor names avx3"),
        ({"floor": {"avx2": {"float32": 70}}, "form": "training"}, "floor needs form forward or step"),
        ({"torch_floor": {"float64": 2}}, "torch_floor must give a number for some of dtypes"),
        ({"against": "heads"}, "against must be one of attention, lengths, got 'heads'"),
        ({"against": "lengths"}, r"against lengths needs several tokens, got \[40\]"),
        ({"against": "attention", "form": "training"}, "against needs form forward"),
        ({**CONVOLUTION, "against": "attention"}, "against attention needs inputs q, k and v"),
        ({"limit_ratio": 1.25}, "limit_ratio needs against, or form training"),
        ({"limit_ratio": -1}, "limit_ratio must be a number of at least 0"),
        ({"limit_mib_per_thread": "4"}, "limit_mib_per_thread must be a number of at least 0"),
        ({**STEP, "limit_mib_per_thread": 4}, "limit_mib_per_thread needs form forward or training"),
        ({"heads": 3}, "unknown key heads"),
    ],
)
def test_wrong_entries(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
