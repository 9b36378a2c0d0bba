"""Names of flash-linear-attention: all that are ours are found, with its signatures, and all are restored."""

import inspect
import sys
from importlib import import_module

import pytest
import torch
from fla.backends import BackendRegistry
from fla.ops import chunk_kda as kda_before

import subquad
from subquad.fla.families import FAMILIES
from subquad.fla.layers import FUNCTIONS

# What 0.6.0 has in a module that it cannot import itself.
BROKEN = {"fla.ops.delta_rule.parallel"}


def modules():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fla"}


def registries():
    found = [
        x for module in modules().values() for x in vars(module).values() if isinstance(x, BackendRegistry)
    ]
    backends = import_module("fla.backends")
    return [*found, *backends._operation_registries.values(), *backends._function_registries.values()]


def state():
    names = {(name, key): value for name, module in modules().items() for key, value in vars(module).items()}
    tables = {name: vars(module).get("ACT2FN") for name, module in modules().items()}
    # transformers' table of that name builds an object for each look-up.
    tables = {name: dict(table) for name, table in tables.items() if type(table) is dict}
    return names, tables, [dict(registry._backends) for registry in registries()]


def test_uninstall_restores_everything():
    # Installing imports what it replaces; that stays.
    subquad.fla.install()
    subquad.fla.uninstall()
    names, tables, backends = before = state()
    subquad.fla.install()
    during = state()
    assert sum(during[0].get(key) is not value for key, value in names.items()) > 100
    assert sum(one != other for one, other in zip(during[2], backends, strict=True)) > 5
    assert any(during[1][name] != table for name, table in tables.items())
    subquad.fla.uninstall()
    after = state()
    assert after[1:] == before[1:]
    assert after[0].keys() == names.keys()
    assert all(after[0][key] is value for key, value in names.items())


def test_the_table_has_what_the_package_has():
    missing = set()
    for module, names in FAMILIES.items():
        if module not in BROKEN:
            missing |= {(module, name) for name in names if not hasattr(import_module(module), name)}
    for candidates, functions in FUNCTIONS:
        module = import_module(candidates[0])
        missing |= {(candidates[0], name) for name in functions if not hasattr(module, name)}
    assert not missing


def test_operators_of_the_table_are_all_that_both_have(installed):
    families = {name for names in FAMILIES.values() for name in names}
    assert set(import_module("fla.ops").__all__) & set(subquad.ops.__all__) <= families


def _pairs():
    for module, names in FAMILIES.items():
        if module not in BROKEN:
            yield from ((getattr(import_module(module), name), getattr(subquad.ops, name)) for name in names)
    for candidates, functions in FUNCTIONS:
        module = import_module(candidates[0])
        yield from ((getattr(module, name), function) for name, function in functions.items())


def test_every_argument_is_accepted_in_its_place():
    compared = 0
    for theirs, ours in _pairs():
        if theirs.__name__ == "apply":
            # Of an autograd function, which has no names.
            continue
        wanted, given = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
        named = [name for name in wanted if name not in {"kwargs", "use_graph", "max_num_seqs"}]
        assert [*given][: len(named)] == named, ours.__name__
        for name in named:
            default = wanted[name].default
            # Where they have a dtype, `None` means the same.
            if default is not inspect.Parameter.empty and not isinstance(default, torch.dtype):
                assert given[name].default == default, f"{ours.__name__}: {name}"
        compared += 1
    assert compared > 50


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 1, 70, 2, 16)
    return q, k, v, -g.abs(), torch.rand(1, 70, 2)


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda", "chunk_gla", "chunk_delta_rule"])
def test_operators_have_the_bits_of_ours(name, inputs, installed):
    arguments = {"q": 0, "k": 1, "v": 2, "g": 3, "beta": 4}
    accepted = inspect.signature(getattr(subquad.ops, name)).parameters
    given = {key: inputs[i] for key, i in arguments.items() if key in accepted}
    found = getattr(import_module("fla.ops"), name)(**given, output_final_state=True)
    for one, other in zip(found, getattr(subquad.ops, name)(**given, output_final_state=True), strict=True):
        assert torch.equal(one, other)


def test_what_was_bound_before_goes_through_the_registry(inputs, installed):
    assert kda_before is import_module("fla.ops.kda").chunk_kda
    assert torch.equal(kda_before(*inputs)[0], subquad.ops.chunk_kda(*inputs)[0])


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_gla"])
def test_other_devices_are_theirs(name, inputs, installed):
    # Whose first kernel has no device to run on here.
    count = 5 if name == "chunk_kda" else 4
    with pytest.raises(RuntimeError, match="active driver"):
        getattr(import_module("fla.ops"), name)(*(x.to("meta") for x in inputs[:count]))


def test_what_is_not_ours_is_theirs(installed):
    ops = import_module("fla.ops")
    before = ops.chunk_comba
    assert before.__module__.startswith("fla.ops.comba")
    with pytest.raises(ImportError):
        exec("from fla.ops.gla import no_such_operator")
