"""Sequences that are read from their last token to the first."""

import inspect

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from subquad import ops

from . import cases, composed
from .cases import DTYPES, Sizes, about, assert_same_bits, bounds_of, spans

LENGTHS = (0, 5, 0, 64, 1, 33, 0)
# What has no row for each token.
CONSTANT = ("u", "g_gamma")


def _takes_reverse(function):
    return "reverse" in inspect.signature(getattr(ops, function)).parameters


# Each form that has the argument, with the functions to draw, call and check it.
FORMS = {
    **{name: cases for name, form in cases.FORMS.items() if _takes_reverse(form.function)},
    **{name: composed for name, (function, _) in composed.FORMS.items() if _takes_reverse(function)},
}


def family_of(form):
    return cases.FORMS[form].family if FORMS[form] is cases else composed.FORMS[form][1]


def check(form, found, expected, dtype):
    (cases.check if FORMS[form] is cases else composed.check_found)(found, expected, dtype)


def drawn(form, dtype, *, tokens=65, lengths=None):
    """Inputs, states, and the options of packed sequences if there are any."""
    sizes = Sizes(tokens=tokens) if lengths is None else Sizes(batch=1, tokens=sum(lengths))
    module, family = FORMS[form], family_of(form)
    inputs = module.draw_inputs(family, sizes, dtype)
    count = None if lengths is None else len(lengths)
    states = module.draw_states(family, sizes, dtype, sequences=count)
    return inputs, states, {} if lengths is None else {"cu_seqlens": bounds_of(lengths)}


def flipped(inputs):
    return {name: x if name in CONSTANT else x[:, ::-1] for name, x in inputs.items()}


def test_every_family_is_there():
    assert {form.split()[0] for form in FORMS} == {
        f"fused_recurrent_{name}"
        for name in (
            "dplr_delta_rule",
            "gla",
            "gsa",
            "lightning_attn",
            "linear_attn",
            "retention",
            "rwkv6",
            "simple_gla",
        )
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["rows", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_against_the_oracle(form, lengths, dtype):
    for tokens in (0, 1, 3, 65) if lengths is None else (None,):
        inputs, states, option = drawn(form, dtype, tokens=tokens, lengths=lengths)
        expected = FORMS[form].expect(family_of(form), inputs, states, reverse=True, **option)
        with about(tokens):
            check(form, FORMS[form].call(form, inputs, states, reverse=True, **option), expected, dtype)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_in_the_other_order(form, library, convert_all):
    inputs, states, _ = drawn(form, "float32")
    module, given = FORMS[form], convert_all(library, states)
    o, finals = module.call(form, convert_all(library, flipped(inputs)), given)
    found = module.call(form, convert_all(library, inputs), given, reverse=True)
    assert_same_bits(found, (np.asarray(o)[:, ::-1], finals))
    if library == "numpy":
        assert found[0].flags.c_contiguous


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_are_separate_calls(form, library, convert, convert_all):
    module = FORMS[form]
    inputs, states, option = drawn(form, "float32", lengths=LENGTHS)
    parts = []
    for n, (start, stop) in enumerate(spans(LENGTHS)):
        one = {name: x if name in CONSTANT else x[:, start:stop] for name, x in inputs.items()}
        state = convert_all(library, tuple(x[n : n + 1] for x in states))
        parts.append(module.call(form, convert_all(library, one), state, reverse=True))
    finals = tuple(np.concatenate(x) for x in zip(*(part[1] for part in parts), strict=True))
    expected = (np.concatenate([part[0] for part in parts], axis=1), finals)
    bounds = option["cu_seqlens"]
    for kind in (np.int32, np.int64):
        given = convert(library, bounds.astype(kind))
        found = module.call(
            form,
            convert_all(library, inputs),
            convert_all(library, states),
            reverse=True,
            cu_seqlens=given,
        )
        assert_same_bits(found, expected)
    np.testing.assert_array_equal(bounds, bounds_of(LENGTHS))


def test_against_a_loop():
    """Written out once, with states of values first and sequences of two lengths."""
    lengths = (3, 4)
    inputs, (state,), option = drawn("fused_recurrent_gla gla", "float64", lengths=lengths)
    q, k, v, gates = inputs["q"], inputs["k"], inputs["v"], np.exp(inputs["gk"])
    o, finals = np.zeros_like(v), state.copy()
    for n, tokens in enumerate(([2, 1, 0], [6, 5, 4, 3])):
        for t in tokens:
            for h in range(2):
                finals[n, h] *= gates[0, t, h][:, None]
                finals[n, h] += np.outer(k[0, t, h], v[0, t, h])
                o[0, t, h] = 20**-0.5 * q[0, t, h] @ finals[n, h]
    found, final = ops.fused_recurrent_gla(
        q,
        k,
        v,
        inputs["gk"],
        initial_state=state.swapaxes(-1, -2),
        output_final_state=True,
        reverse=True,
        state_v_first=True,
        **option,
    )
    np.testing.assert_allclose(found, o, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(final.swapaxes(-1, -2), finals, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [form for form in FORMS if "abc" not in form])
def test_the_later_part_comes_first(form):
    inputs, states, _ = drawn(form, "float64", tokens=100)
    expected = FORMS[form].call(form, inputs, states, reverse=True)
    outputs = []
    for start, stop in ((70, 100), (69, 70), (0, 69)):
        one = {name: x if name in CONSTANT else x[:, start:stop] for name, x in inputs.items()}
        o, states = FORMS[form].call(form, one, states, reverse=True)
        outputs.insert(0, o)
    check(form, (np.concatenate(outputs, axis=1), states), expected, "float64")


def leaves(inputs, states):
    return [torch.from_numpy(x).requires_grad_() for x in (*inputs.values(), *states)]


@pytest.mark.parametrize("lengths", [None, (2, 0, 5)], ids=["rows", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_differences(form, lengths):
    module, family = FORMS[form], family_of(form)
    sizes = Sizes(2 if lengths is None else 1, 7, 2, 2, 3, 2)
    inputs = module.draw_inputs(family, sizes, "float64")
    states = module.draw_states(family, sizes, "float64", sequences=None if lengths is None else 3)
    option = {} if lengths is None else {"cu_seqlens": torch.tensor(bounds_of(lengths))}

    def function(*tensors):
        arrays = dict(zip(inputs, tensors, strict=False))
        o, finals = module.call(form, arrays, tensors[len(inputs) :], reverse=True, **option)
        return (o, *finals)

    assert gradcheck(function, leaves(inputs, states), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name] is cases])
def test_compiled(form):
    lengths = (3, 0, 6)
    inputs, states, option = drawn(form, "float64", lengths=lengths)
    bounds = torch.from_numpy(option["cu_seqlens"])

    def function(*tensors):
        arrays = dict(zip(inputs, tensors, strict=False))
        o, finals = cases.call(form, arrays, tensors[len(inputs) :], reverse=True, cu_seqlens=bounds)
        return (o, *finals)

    torch._dynamo.reset()
    given = leaves(inputs, states)
    results, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*given), function(*given)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y)
    found, wanted = (torch.autograd.grad([x.sum() for x in one], given) for one in (results, expected))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_refused(form):
    inputs, states, _ = drawn(form, "float32", lengths=(2, 4))
    queries = next(iter(inputs))
    calls = {
        # Bounds are those that were given.
        "cu_seqlens: expected .*a first element of 0": {"cu_seqlens": np.array([1, 6])},
        "cu_seqlens: expected .*a last element of 6": {"cu_seqlens": np.array([0, 5])},
        "cu_seqlens: expected .*numbers that do not decrease": {"cu_seqlens": np.array([0, 4, 3, 6])},
        "cu_seqlens: expected shape": {"cu_seqlens": np.array([[0, 6]])},
        "initial_state: expected shape": {"cu_seqlens": np.array([0, 1, 2, 6])},
    }
    for message, option in calls.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            FORMS[form].call(form, inputs, states, reverse=True, **option)
    rows = FORMS[form].draw_inputs(family_of(form), Sizes(), "float32")
    with pytest.raises(ValueError, match=rf"^{queries}: expected shape \(1, 65, .*, as cu_seqlens is given"):
        FORMS[form].call(form, rows, reverse=True, cu_seqlens=np.array([0, 65]))
    for wrong in (np.array([0.0, 6.0]), np.array([False, True]), [0, 6], torch.tensor([0, 6]), 6):
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected"):
            FORMS[form].call(form, inputs, reverse=True, cu_seqlens=wrong)
    for name in set(inputs) - {*CONSTANT}:
        x = inputs[name]
        for wrong in (x[0, 0, 0], x[None], [1.0], torch.from_numpy(x) if name != queries else None):
            with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
                FORMS[form].call(form, {**inputs, name: wrong}, reverse=True)
