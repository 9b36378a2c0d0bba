"""Recurrent operators in PyTorch: the custom operators, compiled code, autocast, transforms."""

import pytest
import torch
from torch.library import opcheck

from subquad import ops
from subquad.ops.recurrent import recurrent
from subquad.torch import library
from subquad.torch.recurrent_operators import RECURRENT, RECURRENT_BACKWARD, with_defaults
from subquad.torch.schema_values import carried, restored

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
B, T, H, HV, K, V = 2, 6, 1, 2, 4, 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates(*width):
    return -draw(B, T, HV, *width, seed=5).abs()


# Options without gradients, and those with them.
FEATURES = {
    "plain": ({}, {}),
    "heads": ({}, {"g_gamma": -draw(HV, seed=4).abs()}),
    "delta": (
        {"delta": True, "use_qk_l2norm_in_kernel": True},
        {"g": gates(), "beta": draw(B, T, HV, seed=6).sigmoid()},
    ),
    "low rank": (
        {"scale": 0.5, "chunk_size": 16},
        {"gk": gates(K), "a": draw(B, T, H, K, seed=6), "b": draw(B, T, H, K, seed=7)},
    ),
    "bonus": ({}, {"u": draw(H, K, seed=6)}),
    "state": ({"state_v_first": True}, {"initial_state": draw(B, HV, V, K, seed=8)}),
}


@pytest.fixture(params=FEATURES.values(), ids=FEATURES)
def feature(request):
    """Options, and those with a gradient."""
    return request.param


@pytest.fixture
def qkv():
    """Queries, keys and values that require grad."""
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, HV, V))
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def function_of(feature):
    options, learned = feature

    def function(q, k, v, *rest):
        given = options | dict(zip(learned, rest, strict=True))
        return recurrent(q * 1.5, k, v, output_final_state=True, **given)

    return function


def leaves(feature, qkv):
    return [*qkv, *(x.clone().requires_grad_() for x in feature[1].values())]


def test_opcheck(feature, qkv):
    options = with_defaults(feature[0] | {name: x.requires_grad_() for name, x in feature[1].items()})
    opcheck(library.overload(RECURRENT), carried(RECURRENT, qkv, options))


def test_opcheck_of_the_backward(feature, qkv):
    options = with_defaults(feature[0] | feature[1])
    options = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    qkv = [x.detach() for x in qkv]
    options["wrt"] = ["q", "k", "v", *feature[1]]
    out, state, kept = library.call(RECURRENT, qkv, options | {"keep": True})
    found = []
    for keep, given in ((True, kept), (False, kept.new_empty(0))):
        options["keep"] = keep
        for gradients in ((out, None), (None, state), (out, state)):
            arguments = carried(RECURRENT_BACKWARD, (*gradients, given, *qkv), options)
            opcheck(library.overload(RECURRENT_BACKWARD), arguments)
        found.append(library.call(RECURRENT_BACKWARD, (out, state, given, *qkv), options))
    assert all(map(torch.equal, *found))


def test_inference_keeps_nothing(feature, qkv):
    function, inputs = function_of(feature), [x.detach() for x in leaves(feature, qkv)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    graphs = []

    def record(graph, _inputs):
        graphs.append(graph)
        return graph

    torch.compile(function, fullgraph=True, backend=record, dynamic=False)(*inputs)
    torch.testing.assert_close(compiled(*inputs)[0], function(*inputs)[0])
    calls = [node for node in graphs[0].graph.nodes if "recurrent" in str(node.target)]
    assert [node.meta["example_value"][2].numel() for node in calls] == [0]


def test_outputs_may_change_before_the_backward(feature, qkv):
    function, inputs = function_of(feature), leaves(feature, qkv)
    changed, kept = function(*inputs)[0].mul_(2), function(*inputs)[0] * 2
    found, wanted = (torch.autograd.grad(out.sum(), inputs) for out in (changed, kept))
    assert all(map(torch.equal, found, wanted))


def test_options_survive_the_schema(feature, qkv):
    options = with_defaults(feature[0] | feature[1])
    tensors, back = restored(RECURRENT, carried(RECURRENT, qkv, options))
    assert all(x is y for x, y in zip(tensors, qkv, strict=True))
    assert all(back[name] is x or back[name] == x for name, x in options.items() if name in back)
    assert options.keys() - back.keys() == {"inplace_final_state"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(feature, qkv, backend):
    function, inputs = function_of(feature), leaves(feature, qkv)
    once = torch.compile(function, fullgraph=True, backend=backend)
    results, expected = once(*inputs), function(*inputs)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y)
    found, wanted = (torch.autograd.grad([x.sum() for x in one], inputs) for one in (results, expected))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_lengths_in_one_graph():
    count = 0

    def backend(graph, _inputs):
        nonlocal count
        count += 1
        return graph

    def function(q, g):
        return ops.chunk_simple_gla(q, q, q, g)[0]

    once = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for length in (3, 17, 70):
        q, g = draw(1, length, 2, 4), -draw(1, length, 2).abs()
        torch.testing.assert_close(once(q, g), function(q, g))
    assert count == 1


def test_exported():
    class Layer(torch.nn.Module):
        def forward(self, q, g):
            return ops.chunk_simple_gla(q, q, q, g)[0]

    inputs = (draw(1, 5, 2, 4), -draw(1, 5, 2).abs())
    program = torch.export.export(Layer(), inputs)
    assert "subquad.recurrent" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))


def test_packed_sequences_are_compiled():
    bounds = torch.tensor([0, 4, 4, 9])

    def function(q):
        return ops.chunk_simple_gla(q, q, q, cu_seqlens=bounds, output_final_state=True)

    q = draw(1, 9, 2, 4).requires_grad_()
    results, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(q), function(q)
    assert all(map(torch.equal, results, expected))
    assert expected[1].shape == (3, 2, 4, 4)


def test_autocast_casts_rows_only():
    q = draw(1, 20, 2, 8).float().requires_grad_()
    g = (-draw(1, 20, 2).abs()).float().requires_grad_()
    expected, _ = ops.chunk_simple_gla(q.bfloat16(), q.bfloat16(), q.bfloat16(), g)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = ops.chunk_simple_gla(q, q, q, g, output_final_state=True)
        once = torch.compile(ops.chunk_simple_gla, fullgraph=True, backend="aot_eager")
        compiled, _ = once(q, q, q, g)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(o, expected)
    assert torch.equal(compiled, expected)
    o.sum().backward()
    assert q.grad.dtype == g.grad.dtype == torch.float32


def test_vmap_and_grad():
    q = draw(3, 1, 5, 2, 4)

    def loss(q):
        return ops.chunk_simple_gla(q, q, q)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(q)
    expected = torch.stack([torch.func.grad(loss)(x) for x in q])
    assert torch.equal(found, expected)


def test_a_factor_that_requires_grad_is_refused():
    q = torch.ones(1, 3, 1, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="scale: its gradient is not implemented"):
        recurrent(q, q, q, output_final_state=False, scale=torch.tensor(1.0, requires_grad=True))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 5, 3, 4)
        v = torch.empty(2, 5, 6, 7)
        o, state = recurrent(q, q, v, output_final_state=True)
    assert o.shape == v.shape
    assert state.shape == (2, 6, 4, 7)
