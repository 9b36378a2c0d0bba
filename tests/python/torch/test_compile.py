"""`torch.compile` and `torch.export` of code that calls subquad: whole graphs, with one operator for each call."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

import subquad
from subquad import masks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def qkv():
    """Queries, keys and values that require grad."""
    shapes = ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6))
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def assert_same(function, inputs, **options):
    """Checks results and gradients of a compiled function, bit by bit."""
    once = compiled(function, **options)
    for _ in range(2):
        results, expected = once(*inputs), function(*inputs)
        assert all(map(torch.equal, results, expected))
        wanted = [x for x in inputs if x.requires_grad]
        gradients = [
            torch.autograd.grad(sum(x.where(x.isfinite(), 0.0).sum() for x in one), wanted)
            for one in (results, expected)
        ]
        assert all(map(torch.equal, *gradients))


def test_every_feature(feature):
    learned = feature.learned()
    inputs = [x.requires_grad_() for x in (*feature.inputs(), *learned.values())]

    def function(q, k, v, *rest):
        options = feature.options | dict(zip(learned, rest, strict=True))
        return subquad.attention(q * 1.5, k, v, return_lse=True, **options)

    assert_same(function, inputs)


def test_inductor(qkv):
    mask = masks.document([0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])

    def function(q, k, v):
        return subquad.attention(q, k, v, causal=True, softcap=3.0, mask=mask, return_lse=True)

    assert_same(function, qkv, backend="inductor")


@pytest.mark.slow  # a C++ compiler runs
def test_inductor_around_the_operator(qkv):
    def function(q, k, v):
        return (subquad.attention(q.sin(), k * 2, v, causal=True).square() + 1,)

    once = compiled(function, backend="inductor")
    (result,), (expected,) = once(*qkv), function(*qkv)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(x.sum(), qkv) for x in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)])
def test_scaled_dot_product_attention(is_causal, lengths):
    length, keys = lengths
    q = draw(2, 4, length, 8).requires_grad_()
    k, v = (draw(2, 2, keys, 8, seed=seed).requires_grad_() for seed in (1, 2))
    mask = None if is_causal else draw(length, keys, seed=3)

    def function(q, k, v):
        return (subquad.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True),)

    assert_same(function, (q, k, v))


def test_dynamic_lengths():
    def function(x):
        return (subquad.attention(x, x, x, causal=True),)

    torch._dynamo.mark_dynamic(first := draw(1, 4, 2, 8), 1)
    once = compiled(function)
    assert torch.equal(once(first)[0], function(first)[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 9, 30):
            x = draw(1, length, 2, 8)
            assert torch.equal(once(x)[0], function(x)[0])


def test_masks_made_inside(qkv):
    def function(q, k, v):
        return (subquad.attention(q, k, v, mask=masks.causal() & masks.sliding_window(2)),)

    assert_same(function, qkv)


def test_other_masks_are_other_graphs(qkv):
    once = compiled(lambda mask: subquad.attention(*qkv, mask=mask))
    for mask in (masks.padding([3, 7]), masks.padding([6, 2]), masks.chunked(2)):
        assert torch.equal(once(mask), subquad.attention(*qkv, mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, qkv):
    def function(q, k, v):
        return subquad.attention(
            q, k, v, causal=True, bias=torch.zeros(5, 7, dtype=torch.float64).to(q.dtype)
        )

    with torch.autocast("cpu", dtype=dtype):
        eager, results = function(*qkv), compiled(function)(*qkv)
        theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2)[:, :2] for x in qkv))
    halves = function(*(x.to(dtype) for x in qkv))
    assert eager.dtype == results.dtype == theirs.dtype == dtype
    assert torch.equal(eager, halves)
    assert torch.equal(results, halves)
    gradients = [torch.autograd.grad(x.sum(), qkv) for x in (eager, results)]
    assert all(map(torch.equal, *gradients))
    assert {x.dtype for x in gradients[0]} == {torch.float32}


def test_autocast_leaves_float64(qkv):
    inputs = [x.detach().double() for x in qkv]
    with torch.autocast("cpu"):
        assert torch.equal(subquad.attention(*inputs), compiled(subquad.attention)(*inputs))
        assert subquad.attention(*inputs).dtype == torch.float64


def test_autocast_of_scaled_dot_product_attention(qkv):
    q, k, v = (x.detach().transpose(1, 2) for x in qkv)
    with torch.autocast("cpu"):
        out = subquad.scaled_dot_product_attention(q, k.bfloat16(), v, enable_gqa=True)
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, subquad.scaled_dot_product_attention(*halves, enable_gqa=True))


class Model(torch.nn.Module):
    """Attention of one layer."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)
        self.sinks = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return subquad.attention(q, k, v, causal=True, window_size=(3, 0), sinks=self.sinks).flatten(2)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, x = Model(), draw(2, 6, 16)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}}, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("subquad.attention.default") == 1
    for length in (6, 11):
        x = draw(2, length, 16)
        assert torch.equal(program.module()(x), model(x))


def test_modes_that_trace():
    x = draw(1, 6, 2, 8)
    for mode in ("fake", "symbolic"):
        graph = make_fx(lambda x: subquad.attention(x, x, x, softcap=2.0), tracing_mode=mode)(x)
        assert "subquad.attention" in graph.code
        assert torch.equal(graph(x), subquad.attention(x, x, x, softcap=2.0))
    with FakeTensorMode():
        fake = torch.empty(1, 6, 2, 8, requires_grad=True)
        out, lse = subquad.attention(fake, fake, fake, return_lse=True)
        (gradient,) = torch.autograd.grad(out.sum(), fake)
    assert (out.shape, lse.shape, gradient.shape) == ((1, 6, 2, 8), (1, 2, 6), (1, 6, 2, 8))


def test_what_a_graph_cannot_carry_is_refused(qkv):
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, 5, 7, device="cpu")
    fake = FakeTensorMode()
    inputs = [fake.from_tensor(x.detach()) for x in qkv]
    with fake, pytest.raises(NotImplementedError, match=r"mask: .* cannot carry BlockMask"):
        subquad.attention(*inputs, mask=blocks)
    with fake, pytest.raises(NotImplementedError, match=r"out: not supported within torch\.compile"):
        subquad.attention(*inputs, out=torch.empty(2, 5, 4, 6))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="dropout_seed: expected an integer"):
        compiled(subquad.attention)(*(x.detach() for x in qkv), dropout_p=0.5)


def test_negative_windows_are_refused_when_they_are_computed(qkv):
    once = compiled(lambda q, k, v: subquad.attention(q, k, v, window_size=(-1, 0)))
    with pytest.raises(ValueError, match=r"window_size: .* at least 0"):
        once(*qkv)


def test_seeds_of_dropout_are_arguments_of_the_graph(qkv):
    def function(q, k, v, seed):
        return (subquad.attention(q, k, v, dropout_p=0.5, dropout_seed=seed),)

    once = compiled(function, dynamic=True)
    assert torch.equal(once(*qkv, 5)[0], function(*qkv, 5)[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (6, 2**40):
            assert torch.equal(once(*qkv, seed)[0], function(*qkv, seed)[0])


def test_checkpointing_inside(qkv):
    def layer(q, k, v):
        return subquad.attention(q.sin(), k, v, causal=True)

    def function(q, k, v):
        return (torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False),)

    assert_same(function, qkv)


def test_nothing_is_imported_before_it_is_needed(run_python):
    code = """
    import sys, torch, subquad
    x = torch.ones(1, 2, 1, 4)
    subquad.attention(x, x, x)
    assert "subquad.torch" not in sys.modules
    function = torch.compile(lambda x: subquad.attention(x, x, x), fullgraph=True, backend="eager")
    assert torch.equal(function(x), subquad.attention(x, x, x))
    assert "subquad.torch.calls" in sys.modules
    """
    run_python(code, PYTHONWARNINGS="ignore")
