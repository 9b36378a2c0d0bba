"""Gradients of every operator, through outputs and states."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import subquad
from subquad import ops
from subquad.ops.recurrent import recurrent

from .cases import FIRST, FORMS, GROUPED, HALF, Sizes, about, bounds_of, call, part, problem, spans
from .naive import recurrence

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning"
)
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Errors in units of the largest gradient; of half types, the ratio of root mean squares.
TOLERANCES = {"float64": 1e-9, "float32": 3e-5, "bfloat16": 0.02, "float16": 0.005}
LENGTHS = (1, 15, 16, 63, 65, 100)
RULES = ("additive", "scaled", "delta", "low rank", "bonus")
DECAYS = ("none", "heads", "steps", "channels")


def leaves(arrays, dtype=None):
    """Returns tensors that require grad, of copies."""
    return {
        name: torch.tensor(np.asarray(x, np.float64), dtype=dtype).requires_grad_()
        for name, x in arrays.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    named = FORMS[form]
    for sizes in (Sizes(2, 7, 2, 2, 3, 2), Sizes(1, 19, 1, 2 if named.family in GROUPED else 1, 2, 3)):
        given = problem(named.family, sizes, "float64", has_state=named.has_state)
        inputs = leaves(given.inputs)
        states = leaves({str(i): x for i, x in enumerate(given.states)}) if named.has_state else {}
        names = list(inputs)

        def function(*tensors, names=names):
            inputs = dict(zip(names, tensors[: len(names)], strict=True))
            o, final = call(form, inputs, tensors[len(names) :] or None)
            return o, *final

        with about(form, sizes):
            assert gradcheck(function, (*inputs.values(), *states.values()), fast_mode=True)


class Drawn:
    """A call of the engine by rule and decay, its definition, and gradients from outside."""

    def __init__(self, rule, decay, tokens, *, strength=0.3, dtype=torch.float64):
        generator = torch.Generator().manual_seed(7)

        def draw(*shape, kind=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

        batch, heads, value_heads, keys, values = 2, 2, 4, 20, 12
        beside = torch.float64 if dtype == torch.float64 else torch.float32
        rows = (batch, tokens, heads, keys)
        self.leaves = {"q": draw(*rows), "k": draw(*rows) / 3, "v": draw(batch, tokens, value_heads, values)}
        self.leaves["initial_state"] = draw(batch, value_heads, keys, values, kind=beside)
        shapes = {"heads": (value_heads,), "steps": (batch, tokens, value_heads)}
        shapes["channels"] = (*shapes["steps"], keys)
        if decay != "none":
            name = {"heads": "g_gamma", "steps": "g", "channels": "gk"}[decay]
            self.leaves[name] = -strength * draw(*shapes[decay], kind=beside).abs() ** 3
        if rule in ("scaled", "delta"):
            self.leaves["beta"] = draw(batch, tokens, value_heads, kind=beside).sigmoid()
        if rule == "low rank":
            self.leaves |= {"a": draw(*rows) / 4, "b": draw(*rows) / 4}
        if rule == "bonus":
            self.leaves["u"] = draw(heads, keys, kind=beside)
        self.delta, self.decay = rule == "delta", decay
        self.outside = (
            draw(batch, tokens, value_heads, values),
            draw(batch, value_heads, keys, values, kind=beside),
        )

    def gradients(self, function, dtype=None):
        """Returns the gradients of all leaves by name."""
        given = {
            name: (x.to(dtype) if dtype else x).detach().requires_grad_() for name, x in self.leaves.items()
        }
        results = function(**given)
        outside = [x.to(result.dtype) for x, result in zip(self.outside, results, strict=True)]
        return dict(zip(given, torch.autograd.grad(results, list(given.values()), outside), strict=True))

    def engine(self, q, k, v, **options):
        return recurrent(q, k, v, output_final_state=True, scale=0.4, delta=self.delta, **options)

    def definition(self, q, k, v, initial_state, g_gamma=None, g=None, gk=None, u=None, **options):
        gates = gk
        if g_gamma is not None:
            gates = g_gamma[:, None].expand(*v.shape[:3], 1)
        elif g is not None:
            gates = g.unsqueeze(-1)
        return recurrence(
            q, k, v, initial_state, scale=0.4, gates=gates, bonus=u, delta=self.delta, **options
        )

    def check(self, dtype, **options):
        expected = self.gradients(self.definition, torch.float64)
        found = self.gradients(lambda **given: self.engine(**given, **options))
        for name, wanted in expected.items():
            assert found[name].dtype == self.leaves[name].dtype
            assert found[name].shape == wanted.shape
            error, size = (found[name].double() - wanted).numpy(), wanted.abs().numpy()
            assert np.isfinite(error).all(), name
            if dtype in HALF:
                ratio = np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(size**2))
            else:
                ratio = np.abs(error).max() / size.max()
            assert ratio <= TOLERANCES[dtype], f"{name}: {ratio:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_against_autograd_of_the_definition(rule, decay, dtype):
    for tokens in LENGTHS:
        with about(tokens):
            Drawn(rule, decay, tokens, dtype=getattr(torch, dtype)).check(dtype)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_a_long_sequence(rule, decay):
    Drawn(rule, decay, 1000, dtype=torch.float32).check("float32")


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("rule", RULES)
def test_chunks(rule, size):
    Drawn(rule, "channels", 70).check("float64", chunk_size=size)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("strength", [1e-6, 30.0])
@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("rule", RULES)
def test_weak_and_strong_gates(rule, decay, strength, dtype):
    Drawn(rule, decay, 50, strength=strength, dtype=getattr(torch, dtype)).check(dtype)


def test_infinite_gates_have_no_gradient():
    drawn = Drawn("delta", "steps", 40)
    drawn.leaves["g"][:, [0, 11]] = -torch.inf
    found = drawn.gradients(drawn.engine)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["g"][:, 11].abs().max() < 1e-12 * found["g"].abs().max()
    assert (found["initial_state"] == 0).all()


@pytest.mark.parametrize("name", ["state_v_first", "use_qk_l2norm_in_kernel"])
def test_orders_and_lengths(name):
    drawn = Drawn("delta", "steps", 40)

    def definition(q, k, initial_state, **options):
        if name == "state_v_first":
            o, state = drawn.definition(q, k, initial_state=initial_state.mT, **options)
            return o, state.mT
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        return drawn.definition(q, k, initial_state=initial_state, **options)

    if name == "state_v_first":
        drawn.leaves["initial_state"] = drawn.leaves["initial_state"].mT.contiguous()
        drawn.outside = (drawn.outside[0], drawn.outside[1].mT.contiguous())
    expected = drawn.gradients(definition)
    found = drawn.gradients(lambda **given: drawn.engine(**given, **{name: True}))
    for one, wanted in expected.items():
        torch.testing.assert_close(found[one], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FIRST)
def test_halves_through_the_state(family):
    form = FIRST[family]
    given = problem(family, Sizes(tokens=40), "float64")
    whole, halves = leaves(given.inputs), leaves(given.inputs)
    o, _ = call(form, whole, tuple(map(torch.tensor, given.states)))
    o.sum().backward()
    first, states = call(form, part(family, halves, 0, 21), tuple(map(torch.tensor, given.states)))
    second, _ = call(form, part(family, halves, 21, 40), states)
    (first.sum() + second.sum()).backward()
    for name, x in whole.items():
        torch.testing.assert_close(halves[name].grad, x.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FIRST)
def test_packed_sequences(family):
    lengths = (5, 0, 33, 2)
    form = FIRST[family]
    sizes = Sizes(batch=1, tokens=sum(lengths))
    given = problem(family, sizes, "float64", has_state=False)
    packed, separate = leaves(given.inputs), leaves(given.inputs)
    o, _ = call(form, packed, cu_seqlens=torch.tensor(bounds_of(lengths)))
    weights = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(3))
    (o * weights).sum().backward()
    for start, stop in spans(lengths):
        o, _ = call(form, part(family, separate, start, stop))
        (o * weights[:, start:stop]).sum().backward()
    for name, x in packed.items():
        torch.testing.assert_close(x.grad, separate[name].grad, rtol=1e-9, atol=1e-9)


def test_threads_change_no_bits():
    drawn = Drawn("delta", "channels", 100, dtype=torch.float32)
    found = []
    for threads in (1, 2, 3):
        subquad.set_num_threads(threads)
        found.append(drawn.gradients(drawn.engine))
    for other in found[1:]:
        assert all(torch.equal(other[name], x) for name, x in found[0].items())


def test_some_gradients_only():
    drawn = Drawn("delta", "steps", 20)
    everything = drawn.gradients(drawn.engine)
    for name, x in drawn.leaves.items():
        given = drawn.leaves | {name: x.detach().requires_grad_()}
        o, state = drawn.engine(**given)
        torch.autograd.backward((o, state), drawn.outside)
        assert torch.equal(given[name].grad, everything[name])


def test_without_tokens():
    drawn = Drawn("scaled", "steps", 0)
    found = drawn.gradients(drawn.engine)
    assert torch.equal(found["initial_state"], drawn.outside[1])
    assert all(found[name].shape == x.shape for name, x in drawn.leaves.items())


def test_inputs_that_are_not_contiguous():
    drawn = Drawn("delta", "steps", 20)
    expected = drawn.gradients(drawn.engine)

    def strided(q, v, g, **options):
        q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, v))
        return drawn.engine(q=q, v=v, g=g.mT.contiguous().mT, **options)

    found = drawn.gradients(strided)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_second_derivatives_are_refused():
    q = torch.ones(1, 3, 1, 4, requires_grad=True)
    o, _ = ops.chunk_simple_gla(q, q, q)
    (gradient,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"subquad::recurrent_backward: second derivatives"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    q = torch.ones(1, 3, 1, 4)
    with pytest.raises(NotImplementedError, match=r"subquad::recurrent: forward-mode derivatives"):
        torch.func.jvp(lambda q: ops.chunk_simple_gla(q, q, q)[0], (q,), (q,))


def test_states_in_place_have_no_gradient():
    q = torch.ones(1, 3, 1, 4, requires_grad=True)
    state = torch.zeros(1, 1, 4, 4)
    with pytest.raises(
        RuntimeError, match=r"recurrent\(\): functions with inplace_final_state=\.\.\. arguments"
    ):
        recurrent(q, q, q, output_final_state=True, initial_state=state, inplace_final_state=True)
