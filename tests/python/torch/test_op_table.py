"""The table of operators, the custom operators made from it, and what schemas carry."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

import subquad
from subquad import masks, normalizers
from subquad.torch import library
from subquad.torch.attention_operators import ATTENTION, ATTENTION_BACKWARD
from subquad.torch.schema_values import carried, restored, schema
from subquad.torch.table import TABLE

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


def call_of(feature):
    """Returns a call of the operator with all that can requiring grad."""
    inputs, options = feature.inputs(), feature.lowered()
    learned = [value for name, value in options.items() if name in feature.learned()]
    for tensor in (*inputs, *learned):
        tensor.requires_grad_()
    return inputs, options


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_opcheck(feature):
    inputs, options = call_of(feature)
    opcheck(library.overload(ATTENTION), carried(ATTENTION, inputs, options))


def test_opcheck_of_the_backward(feature):
    inputs, options = call_of(feature)
    wrt = ["q", "k", "v", *feature.learned()]
    options = {name: detached(value) for name, value in options.items()}
    inputs = [x.detach() for x in inputs]
    out, lse = library.call(ATTENTION, inputs, options)
    for gradients in ((torch.ones_like(out), None), (None, torch.ones_like(lse)), (out, lse)):
        tensors = (*gradients, out, lse, *inputs)
        arguments = carried(ATTENTION_BACKWARD, tensors, options | {"wrt": wrt})
        opcheck(library.overload(ATTENTION_BACKWARD), arguments)


def test_the_operator_computes_what_the_function_does(feature):
    inputs, options = call_of(feature)
    out, lse = library.call(ATTENTION, inputs, options)
    given = feature.options | {name: options[name] for name in feature.learned()}
    expected = subquad.attention(*inputs, return_lse=True, **given)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    tensors = [*inputs, *(options[name] for name in feature.learned())]
    found = torch.autograd.grad(out.sum(), tensors)
    assert all(map(torch.equal, found, torch.autograd.grad(expected[0].sum(), tensors)))


def test_options_survive_the_schema(feature):
    inputs, options = call_of(feature)
    tensors, back = restored(ATTENTION, carried(ATTENTION, inputs, options))
    assert all(x is y for x, y in zip(tensors, inputs, strict=True))
    assert back.keys() == options.keys()

    def plain(value):
        if isinstance(value, (tuple, list)):
            return type(value)(map(plain, value))
        return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value).tolist()

    for name, value in options.items():
        assert plain(back[name]) == plain(value), name


@pytest.mark.parametrize("power", [1.0, 1e-300, 0.1, float(np.nextafter(2.0, 3.0))])
def test_numbers_survive_as_they_are(power, plain_options):
    lowered = normalizers.Power(power)._lowered()
    options = plain_options | {"normalizer": lowered}
    _, back = restored(ATTENTION, carried(ATTENTION, (None,) * 3, options))
    assert back["normalizer"] == lowered


def test_gradients_that_are_not_there(plain_options):
    q = torch.ones(1, 3, 2, 4)
    scale = torch.ones(3, requires_grad=True)
    out, _ = library.call(ATTENTION, (q, q, q), plain_options | {"scale": scale})
    with pytest.raises(
        NotImplementedError, match="subquad::attention: the gradient of scale is not implemented"
    ):
        out.sum().backward()


def test_changes_of_a_table_are_found_out(plain_options):
    q = torch.ones(1, 3, 2, 4, requires_grad=True)
    arguments = carried(ATTENTION, (q, q, q), plain_options | {"mask": masks.document([0, 0, 1])._lowered()})
    tables = [one.clone() for one in arguments[9]]
    out, _ = library.overload(ATTENTION)(*arguments[:9], tables, *arguments[10:])
    tables[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_rows_are_complete():
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        names = {*(name.rstrip("?") for name in row.tensors), *row.optional}
        assert row.differentiable <= names
        assert row.derivative is None or row.derivative in TABLE
        assert bool(row.missing) == (row.derivative is None)
        assert str(library.overload(row)._schema) == f"subquad::{schema(row)}"
