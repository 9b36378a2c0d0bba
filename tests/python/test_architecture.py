"""The layers of the Python package, the size of its files and the names of its modules."""

import ast
import sys
from pathlib import Path, PurePath

import pytest

import subquad

PACKAGE = Path(subquad.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]

# The layers from the bottom, and what each may import besides the standard library and the layers below it.
# Modules of one layer do not import each other, except within one package.
LAYERS = [
    {"_native": set()},
    {"masks": {"numpy"}, "normalizers": set(), "biases": {"numpy"}},
    {"_runtime": set(), "ops": set(), "reference": {"numpy"}},
    {"testing": {"numpy"}, "flash_attn": set()},
    {"torch": {"torch", "numpy"}, "fla": {"torch"}},
    {"hf": {"torch", "transformers", "numpy"}},
    {"cli": {"numpy", "torch"}},
]
# What the package itself offers, and what it imports when it is asked for.
ROOT = {"_native", "_runtime", "ops", "masks", "normalizers", "biases", "flash_attn", "fla"}
# The one reference upwards: what the extension cannot compute is PyTorch's business, and nothing below may import that.
SEAM = (PurePath("ops", "pytorch.py"), "subquad.torch.calls")
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def component(path):
    """Returns the part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, *, lazy):
    """Yields what a file imports, as absolute names; `lazy` adds imports within functions."""
    return imports_of(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE), lazy=lazy)


def imports_of(code, path, *, lazy):
    """Yields what the code of a file imports."""
    package = ["subquad", *path.parts[:-1]]

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*base, *([child.module] if child.module else [])])
                yield from (f"{base}.{alias.name}" for alias in child.names)
            elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child)

    return visit(ast.parse(code))


def test_every_component_has_a_layer():
    assert {component(path) for path in FILES} - {"__init__", "__main__"} == set(RANK) - {"_native"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_layers_import_downwards(path):
    here = component(path)
    for name in imports(path, lazy=True):
        root, _, rest = name.partition(".")
        if root != "subquad":
            continue
        there = rest.partition(".")[0]
        if here == "__init__":
            assert there in ROOT, f"{path} imports {name}"
        elif here == "__main__":
            assert there == "cli", f"{path} imports {name}"
        elif here == "cli":
            # What it needs of other layers it imports when a command runs.
            continue
        elif there in RANK:
            is_seam = (path.relative_to(PACKAGE), name) == SEAM
            assert there == here or RANK[there] < RANK[here] or is_seam, f"{path} imports {name}"
        else:
            assert hasattr(subquad, there), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_libraries_are_imported_where_they_may_be(path):
    here = component(path)
    allowed = {"subquad", *sys.stdlib_module_names}
    if here in RANK:
        allowed |= LAYERS[RANK[here]][here]
    # The command line imports what a command needs when it runs; everything else declares it at the top.
    for name in imports(path, lazy=here != "cli"):
        if here == "cli" and name.partition(".")[0] in {
            "rich",
            "accelerate",
            "gguf",
            "platformdirs",
            "tomli",
            "jax",
        }:
            continue
        assert name.partition(".")[0] in allowed, f"{path} imports {name}"


def test_hf_and_torch_are_imported_by_name_only():
    for path in FILES:
        if component(path) in {"hf", "torch"}:
            continue
        for name in imports(path, lazy=False):
            assert not name.startswith(("subquad.hf", "subquad.torch")), f"{path} imports {name} at import"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_names_say_what_is_in_a_module(path):
    assert not FORBIDDEN_NAMES & {
        part.removesuffix(".py").lstrip("_") for part in path.relative_to(PACKAGE).parts
    }


def test_assertions_are_for_tests():
    # User errors are exceptions, and `python -O` removes assertions.
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not lines, f"{path} asserts in lines {lines}"


def test_imports_are_found():
    # The tests above would hold for files in which none is found.
    code = """
import a.b
from c import d
from . import exact
from ..torch import override
if True:
    from .. import _native
def function():
    import e
"""
    path = PurePath("ops", "exact.py")
    found = ["a.b", "c.d", "subquad.ops.exact", "subquad.torch.override", "subquad._native"]
    assert list(imports_of(code, path, lazy=False)) == found
    assert list(imports_of(code, path, lazy=True)) == [*found, "e"]
