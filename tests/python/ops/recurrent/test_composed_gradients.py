"""Gradients of composed operators: against differences in float64, of other dtypes against those, where numbers are at limits."""

import numpy as np
import pytest
import torch

from .cases import HALF, Sizes, about, accumulator, bounds_of
from .composed import FAMILIES, FIRST, FORMS, call, draw_inputs, draw_states

SIZES = Sizes(batch=2, tokens=5, heads=1, value_heads=2, keys=3, values=2)
LENGTHS = (2, 0, 3, 1)
# Of gradients in float32, in units of the largest.
TOLERANCE = 1e-4
# Of the root mean squares of error and gradient in half types.
RATIO = 0.02


def sizes_of(form, **changes):
    """Sizes with heads that share keys where an operator has them."""
    grouped = FAMILIES[FORMS[form][1]].is_grouped
    sizes = SIZES._replace(**changes)
    return sizes if grouped else sizes._replace(heads=sizes.value_heads)


def leaves(convert_all, form, sizes, dtype, *, sequences=None):
    """Inputs and states that require grad, and how a call is made of them."""
    family = FORMS[form][1]
    inputs = convert_all("torch", draw_inputs(family, sizes, dtype))
    states = convert_all("torch", draw_states(family, sizes, dtype, sequences=sequences))
    given = [x.requires_grad_() for x in (*inputs.values(), *states)]

    def run(*given, **options):
        arrays = dict(zip(inputs, given, strict=False))
        o, finals = call(form, arrays, tuple(given[len(inputs) :]), **options)
        return (o, *finals)

    return given, run


def check_differences(run, given):
    assert torch.autograd.gradcheck(run, given, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", FIRST.values())
def test_gradients_are_differences(form, convert_all):
    for tokens in (1, 2, 5):
        given, run = leaves(convert_all, form, sizes_of(form, tokens=tokens), "float64")
        check_differences(run, given)


@pytest.mark.parametrize("form", FIRST.values())
def test_gradients_of_chunks_are_differences(form, convert_all, way):
    given, run = leaves(convert_all, form, sizes_of(form, batch=1, tokens=18), "float64")
    check_differences(run, given)


@pytest.mark.parametrize("form", FIRST.values())
def test_gradients_of_packed_sequences(form, convert_all):
    bounds = torch.from_numpy(bounds_of(LENGTHS))
    sizes = sizes_of(form, batch=1, tokens=sum(LENGTHS))
    given, run = leaves(convert_all, form, sizes, "float64", sequences=len(LENGTHS))
    check_differences(lambda *given: run(*given, cu_seqlens=bounds), given)


def test_gradients_of_numbered_sequences(convert_all):
    seq_idx = torch.tensor([[0, 0, 1, 1, 0], [2, 2, 2, 3, 3]])
    given, run = leaves(convert_all, FIRST["ssd"], SIZES, "float64")
    check_differences(lambda *given: run(*given, seq_idx=seq_idx), given)


def as_real(x):
    return torch.view_as_real(x) if x.is_complex() else x


def gradients(convert_all, form, dtype):
    """Of a sum with fixed weights of all that is returned, for inputs that are the same in all dtypes."""
    family, sizes = FORMS[form][1], sizes_of(form, tokens=70, keys=16, values=8)
    rounded = draw_inputs(family, sizes, "bfloat16"), draw_states(family, sizes, "bfloat16")
    kinds = draw_inputs(family, sizes, dtype), draw_states(family, sizes, dtype)
    inputs = {name: x.astype(kinds[0][name].dtype) for name, x in rounded[0].items()}
    states = tuple(x.astype(y.dtype) for x, y in zip(rounded[1], kinds[1], strict=True))
    given = {**convert_all("torch", inputs), **dict(enumerate(convert_all("torch", states)))}
    for x in given.values():
        x.requires_grad_()
    o, finals = call(
        form, {name: given[name] for name in inputs}, tuple(given[n] for n in range(len(states)))
    )
    generator = np.random.default_rng(3)
    total = 0.0
    for x in map(as_real, (o, *finals)):
        total = total + (x.double() * torch.from_numpy(generator.standard_normal(tuple(x.shape)))).sum()
    total.backward()
    # Those of logarithms of decays: what these are rounded by is divided by small decays.
    return {name: x.grad * x.detach().abs() if name == "a" else x.grad for name, x in given.items()}


def as_numbers(x):
    return as_real(x).double().numpy()


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("form", FIRST.values())
def test_gradients_of_other_dtypes(form, dtype, convert_all):
    expected = gradients(convert_all, form, "float64")
    for name, found in gradients(convert_all, form, dtype).items():
        wanted, error = as_numbers(expected[name]), as_numbers(found) - as_numbers(expected[name])
        with about(name):
            assert np.isfinite(error).all()
            if dtype == "float32":
                assert np.abs(error).max() <= TOLERANCE * np.abs(wanted).max()
            else:
                assert np.sqrt(np.mean(error**2)) <= RATIO * np.sqrt(np.mean(wanted**2))
            if isinstance(name, int) and not found.is_complex():
                assert found.dtype == getattr(torch, accumulator(dtype))


@pytest.mark.parametrize(
    ("family", "name", "number"),
    [
        ("gsa", "g", -np.inf),
        ("gsa", "g", -200.0),
        ("gate_loop", "a", 0.0),
        ("mlstm", "f", -np.inf),
        ("mlstm", "f", -200.0),
        ("mlstm", "f", 200.0),
        ("mlstm", "i", -200.0),
        ("mlstm", "i", 200.0),
        ("mlstm_siging normalized", "f", -200.0),
        ("mlstm_siging normalized", "i", -200.0),
        ("ssd", "dt", 200.0),
        ("ssd", "dt", -200.0),
    ],
)
def test_gradients_are_finite(family, name, number, convert_all):
    inputs = draw_inputs(family, sizes_of(FIRST[family], tokens=40), "float32")
    inputs[name].reshape(-1)[::2] = number
    given = {x: y.requires_grad_() for x, y in convert_all("torch", inputs).items()}
    o, _ = call(FIRST[family], given)
    o.sum().backward()
    for shown, x in given.items():
        with about(shown):
            assert torch.isfinite(as_real(x.grad)).all()


@pytest.mark.parametrize("form", FORMS)
def test_only_what_asks_has_gradients(form, convert_all):
    inputs = convert_all("torch", draw_inputs(FORMS[form][1], sizes_of(form), "float32"))
    for name, x in inputs.items():
        leaf = x.clone().requires_grad_()
        o, _ = call(form, {**inputs, name: leaf})
        o.sum().backward()
        assert leaf.grad is not None
        assert all(other.grad is None for other in inputs.values())
