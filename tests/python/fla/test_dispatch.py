"""`install` in a package like flash-linear-attention: which calls are ours, and what is left behind."""

INPUTS = """
import sys
import torch
import subquad

torch.manual_seed(0)
q, k, v, g = torch.randn(4, 1, 5, 2, 8)
g = -g.abs()
beta = torch.rand(1, 5, 2)
elsewhere = [x.to("meta") for x in (q, k, v, g)]

def ours(result, name, *arguments):
    return torch.equal(result[0], getattr(subquad.ops, name)(*arguments)[0])
"""


def test_cpu_tensors_are_ours_and_others_are_theirs(fake, run_with):
    code = (
        INPUTS
        + """
import fla.layers
from fla.ops.kda import chunk_kda as bound_before
layer = fla.layers.Layer()
subquad.fla.install()
import fla.late
for function in (fla.ops.chunk_gla, fla.ops.gla.chunk_gla, fla.ops.gla.chunk.chunk_gla, fla.late.chunk_gla, layer.forward):
    print(ours(function(q, k, v, g), "chunk_gla", q, k, v, g), function(*elsewhere), end=" ")
    print(ours(function(q=q, k=k, v=v, g=g), "chunk_gla", q, k, v, g), function(q, k, v, g=elsewhere[3]))
for function in (fla.ops.kda.chunk_kda, fla.layers.chunk_kda, bound_before):
    arguments = (q, k, v, g, beta)
    print(ours(function(*arguments), "chunk_kda", *arguments), function(*elsewhere, beta), function is bound_before)
print(fla.ops.chunk_other(q), fla.ops.other_kda(q), fla.backends.reasons[-2:])
print(torch.equal(fla.modules.activations.ACT2FN["silu"](q), torch.nn.functional.silu(q)))
print(layer.gate(q), torch.equal(fla.layers.Layer().gate(q), torch.nn.functional.silu(q)))
"""
    )
    assert run_with(fake, code).splitlines() == [
        *["True fla True fla"] * 5,
        *["True fla True"] * 3,
        "fla fla ['not all tensors are on the CPU', 'subquad has no such function']",
        "True",
        "fla True",
    ]


def test_signatures_and_names_stay(fake, run_with):
    code = """
import inspect
import fla.ops
import subquad
before = fla.ops.chunk_gla
subquad.fla.install()
after = fla.ops.chunk_gla
print(after is before, after.__wrapped__ is before, inspect.signature(after), after.__name__, after.__module__)
"""
    assert run_with(fake, code) == (
        "False True (q, k, v, g, scale=None, **kwargs) chunk_gla fla.ops.gla.chunk\n"
    )


def test_uninstall_restores_every_name(fake, run_with):
    code = (
        INPUTS
        + """
import fla.layers, fla.modules.activations, fla.ops.gla.chunk
def state():
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "fla"}
    names = {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}
    table = dict(fla.modules.activations.ACT2FN)
    return modules, names, table, dict(fla.backends.kda._backends), [*sys.meta_path]
before = state()
subquad.fla.install()
changed = {key for key, value in before[1].items() if state()[1][key] is not value}
print(sorted(name for name, key in changed if key == "chunk_gla"), sorted(fla.backends.kda._backends))
subquad.fla.install()
subquad.fla.uninstall()
held, layer = fla.ops.chunk_gla, fla.layers.Layer()
print(ours(held(q, k, v, g), "chunk_gla", q, k, v, g))
import fla.late
subquad.fla.uninstall()
late = sys.modules.pop("fla.late")
del fla.late
print(state() == before, late.chunk_gla is fla.ops.chunk_gla, held(q, k, v, g), layer.gate(q))
"""
    )
    assert run_with(fake, code).splitlines() == [
        "['fla.layers', 'fla.ops', 'fla.ops.gla', 'fla.ops.gla.chunk'] ['subquad']",
        "True",
        "True True fla fla",
    ]


def test_installing_twice_is_as_installing_once(fake, run_with):
    code = (
        INPUTS
        + """
import fla.ops
original = fla.ops.chunk_gla
for _ in range(2):
    subquad.fla.install()
    subquad.fla.install()
    print(fla.ops.chunk_gla.__wrapped__ is original, len(fla.backends.kda._backends))
    subquad.fla.uninstall()
    subquad.fla.uninstall()
    print(fla.ops.chunk_gla is original, len(fla.backends.kda._backends))
"""
    )
    assert run_with(fake, code).splitlines() == ["True 1", "True 0"] * 2


def test_names_of_others_are_left_alone(fake, run_with):
    code = (
        INPUTS
        + """
import fla.ops
subquad.fla.install()
def theirs(*args):
    return "theirs"
fla.ops.gla.chunk_gla = theirs
subquad.fla.uninstall()
print(fla.ops.gla.chunk_gla is theirs, fla.ops.chunk_gla(q, k, v, g))
"""
    )
    assert run_with(fake, code) == "True fla\n"
