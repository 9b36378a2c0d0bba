"""`_native.pyi` says what the extension is."""

import ast
import inspect
from pathlib import Path

import pytest

from subquad import _native, _runtime
from subquad.ops import exact

STUB = ast.parse(Path(_native.__file__).with_name("_native.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
VARIABLES = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
KINDS = inspect.Parameter


def parameters(node):
    """Returns name, kind and default of the parameters of a function in the stub."""
    positional = node.args.posonlyargs + node.args.args
    defaults = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults
    found = [
        (
            arg.arg,
            KINDS.POSITIONAL_ONLY if arg in node.args.posonlyargs else KINDS.POSITIONAL_OR_KEYWORD,
            default,
        )
        for arg, default in zip(positional, defaults, strict=True)
    ]
    found += [
        (arg.arg, KINDS.KEYWORD_ONLY, default)
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    return [
        (name, kind, KINDS.empty if default is None else ast.literal_eval(default))
        for name, kind, default in found
    ]


def actual(function):
    """Returns the same of a function."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_names():
    public = {name for name in dir(_native) if not name.startswith("_")} | {"__version__"}
    # A module made by PyO3 lists its names itself.
    assert public - {"_native"} == set(FUNCTIONS) | VARIABLES


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name):
    assert parameters(FUNCTIONS[name]) == actual(getattr(_native, name))


@pytest.mark.parametrize("module", [exact, _runtime])
def test_the_public_functions_pass_the_same_arguments_on(module):
    for name in set(FUNCTIONS) & set(vars(module)):
        if inspect.isfunction(getattr(module, name)):
            assert actual(getattr(module, name)) == actual(getattr(_native, name))
