"""`install` where flash-linear-attention is not there, or cannot be imported."""

import pytest

INPUTS = """
import sys
import numpy as np
import subquad

draw = np.random.default_rng(0).standard_normal
q, k, v, g = (draw((1, 5, 2, 8)).astype(np.float32) for _ in range(4))
g = -np.abs(g)
expected, _ = subquad.ops.chunk_gla(q, k, v, g)
"""


def test_operators_are_found_by_every_import(run_python):
    code = (
        INPUTS
        + """
subquad.fla.install()
import fla
from fla.ops import chunk_gla as first
from fla.ops.gla import chunk_gla as second
import fla.ops.kda.gate
from importlib import import_module
third = import_module("fla").ops.gla.chunk_gla
print(first is second is third is subquad.ops.chunk_gla, fla.ops.kda.gate.fused_kda_gate is subquad.ops.fused_kda_gate)
print(np.array_equal(first(q, k, v, g)[0], expected), "torch" in sys.modules)
print(sorted(fla.ops.gla.__all__), "chunk_gla" in dir(fla.ops), "gla" in dir(fla.ops), fla.ops.__name__)
"""
    )
    assert run_python(code).splitlines() == [
        "True True",
        "True False",
        "['chunk_gla', 'fused_recurrent_gla'] True True fla.ops",
    ]


def test_every_operator_of_the_table_is_there(run_python):
    code = """
import subquad
from importlib import import_module
subquad.fla.install()
from subquad.fla.families import FAMILIES
found = set()
for module, names in FAMILIES.items():
    for name in names:
        assert getattr(import_module(module), name) is getattr(subquad.ops, name)
        found.add(name)
print(found <= set(subquad.ops.__all__), len(found) > 30)
"""
    assert run_python(code) == "True True\n"


@pytest.mark.parametrize(
    ("statement", "error", "named"),
    [
        ("from fla.ops.gla import chunk_comba", "ImportError", "chunk_comba"),
        ("from fla.ops import chunk_comba", "ImportError", "chunk_comba"),
        ("import fla; fla.ops.gla.chunk_comba", "AttributeError", "'chunk_comba': flash-linear-attention"),
        ("import fla; fla.layers", "AttributeError", "'layers': flash-linear-attention"),
        ("import fla.layers", "ModuleNotFoundError", "fla.layers"),
        ("from fla.modules import RMSNorm", "ModuleNotFoundError", "fla.modules"),
        ("import fla.ops.comba", "ModuleNotFoundError", "fla.ops.comba"),
        ("import fla.ops.gla.chunk", "ModuleNotFoundError", "fla.ops.gla.chunk"),
    ],
)
def test_what_is_not_there_is_named(statement, error, named, run_python):
    code = f"""
import subquad
subquad.fla.install()
try:
    {statement}
except Exception as error:
    print(type(error).__name__, error)
"""
    found = run_python(code)
    assert found.startswith(error)
    assert named in found


def test_uninstall_leaves_nothing(run_python):
    code = """
import sys
import subquad
import subquad.fla, subquad.ops.gla
def state():
    return [*sys.meta_path], {name for name in sys.modules if name.partition(".")[0] == "fla"}
before = state()
subquad.fla.install()
import fla.ops.gla
import fla.ops.kda.gate
kept = fla.ops.gla.chunk_gla
subquad.fla.uninstall()
print(state() == before, kept is subquad.ops.chunk_gla)
try:
    import fla.ops
except ModuleNotFoundError as error:
    print(error)
subquad.fla.install()
import fla.ops.rwkv7
print(fla.ops.rwkv7.chunk_rwkv7 is subquad.ops.chunk_rwkv7)
"""
    assert run_python(code).splitlines() == ["True True", "No module named 'fla'", "True"]


def test_calls_nest(run_python):
    code = """
import sys
import subquad
finders = [*sys.meta_path]
subquad.fla.uninstall()
subquad.fla.install()
subquad.fla.install()
subquad.fla.uninstall()
import fla.ops.gla
subquad.fla.uninstall()
print("fla" in sys.modules, finders == sys.meta_path)
subquad.fla.uninstall()
subquad.fla.install()
import fla.ops
print(len(sys.meta_path) - len(finders))
"""
    assert run_python(code).splitlines() == ["False True", "1"]


def test_importing_installs_nothing(run_python):
    code = """
import sys
finders = [*sys.meta_path]
import subquad.fla
print(finders == sys.meta_path, [name for name in sys.modules if name in {"fla", "torch"}])
"""
    assert run_python(code) == "True []\n"


def test_a_package_that_misses_another_one_is_as_good_as_absent(fake, run_with):
    # As with Triton, where PyTorch is built for CPUs.
    path = fake / "fla" / "ops" / "__init__.py"
    path.write_text("import not_installed_anywhere\n", encoding="utf-8")
    code = """
import sys
import fla, fla.backends
import subquad
before = [*vars(fla)]
subquad.fla.install()
print(fla.ops.kda.gate.fused_kda_gate is subquad.ops.fused_kda_gate)
from fla.ops.gla import chunk_gla
print(chunk_gla is subquad.ops.chunk_gla, fla.ops.gla.chunk_gla is chunk_gla)
subquad.fla.uninstall()
print(hasattr(fla, "ops"), [*vars(fla)] == before, sorted(name for name in sys.modules if name.startswith("fla")))
"""
    assert run_with(fake, code).splitlines() == ["True", "True True", "False True ['fla', 'fla.backends']"]


@pytest.mark.parametrize("fault", ["import fla.nowhere", "1 / 0"])
def test_a_broken_package_is_not_hidden(fault, fake, run_with):
    (fake / "fla" / "ops" / "__init__.py").write_text(fault, encoding="utf-8")
    code = """
import sys
import subquad
finders = [*sys.meta_path]
try:
    subquad.fla.install()
except (ImportError, ZeroDivisionError) as error:
    print(error)
print(finders == sys.meta_path)
"""
    first, second = run_with(fake, code).splitlines()
    assert first in {"No module named 'fla.nowhere'", "division by zero"}
    assert second == "True"
