"""`override_sdpa`: what it computes, what it leaves to PyTorch, and what it puts back."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import subquad
from subquad.torch import override_sdpa

ORIGINAL = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def restored():
    """Every test leaves PyTorch's function as it was."""
    assert F.scaled_dot_product_attention is ORIGINAL
    yield
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch._C._nn.scaled_dot_product_attention is ORIGINAL


@pytest.fixture
def x():
    """A query, key and value in one."""
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def ours(x, **options):
    """Returns what subquad computes."""
    return subquad.scaled_dot_product_attention(x, x, x, **options)


def test_calls_are_computed_by_subquad(x):
    with override_sdpa() as override:
        assert F.scaled_dot_product_attention is not ORIGINAL
        # Bitwise: PyTorch's own result differs in the last place.
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), ours(x))
        assert torch.equal(
            torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True), ours(x, is_causal=True)
        )
        mask = torch.ones(9, 9, dtype=torch.bool).tril()
        assert torch.equal(
            F.scaled_dot_product_attention(x, x, x, mask, scale=0.5), ours(x, attn_mask=mask, scale=0.5)
        )
        keys = x[:, :1]
        grouped = F.scaled_dot_product_attention(query=x, key=keys, value=keys, enable_gqa=True)
        assert torch.equal(grouped, subquad.scaled_dot_product_attention(x, keys, keys, enable_gqa=True))
        report = override.report()
    assert (report.active, report.computed, report.delegated, report.compiled) == (True, 4, {}, False)
    assert (override.report().active, override.report().computed) == (False, 4)


def test_the_function_looks_like_the_original():
    with override_sdpa():
        assert F.scaled_dot_product_attention.__name__ == ORIGINAL.__name__
        assert F.scaled_dot_product_attention.__doc__ == ORIGINAL.__doc__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(x, dtype):
    x = x.to(dtype)
    with override_sdpa() as override:
        out = F.scaled_dot_product_attention(x, x, x)
    assert torch.equal(out, ours(x))
    assert override.report().computed == 1


def other_device(x):
    """No memory at all."""
    return (x.to("meta"), x.to("meta"), x.to("meta")), {}


def nested(x):
    """Sequences of different lengths."""
    jagged = torch.nested.nested_tensor([x[0, 0], x[0, 0, :4]], layout=torch.jagged)
    return (jagged.unsqueeze(1), jagged.unsqueeze(1), jagged.unsqueeze(1)), {}


def negated(x):
    """What is lazily negated."""
    return (torch._neg_view(x), x, x), {}


def wide(x):
    """Heads that subquad refuses."""
    return (x.repeat(1, 1, 1, 129),) * 3, {}


def subclass(x):
    """A tensor with an opinion of its own."""

    class Mine(torch.Tensor):
        pass

    return (x.as_subclass(Mine), x, x), {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (other_device, "device meta"),
        (nested, "type NestedTensor"),
        (negated, "a negated view"),
        (wide, "subquad refuses it: query: head_dim 1032 is not supported"),
        (subclass, "type Mine"),
    ],
)
def test_other_calls_go_on_to_torch(make, reason, x):
    args, options = make(x)
    expected = ORIGINAL(*args, **options)
    with override_sdpa() as override:
        out = F.scaled_dot_product_attention(*args, **options)
    assert type(out) is type(expected)
    assert out.requires_grad == expected.requires_grad
    if not expected.is_meta:
        flat = [x.values() if x.is_nested else x for x in (out, expected)]
        assert torch.equal(*(x.detach().as_subclass(torch.Tensor) for x in flat))
    (counted,) = override.report().delegated
    assert counted.startswith(reason)
    assert override.report().computed == 0


def test_gradients_are_subquads(x):
    """Queries and a learned bias."""
    bias = torch.zeros(9, 9)
    tensors = [[one.clone().requires_grad_() for one in (x, bias)] for _ in range(2)]
    ORIGINAL(tensors[0][0], x, x, tensors[0][1]).square().sum().backward()
    with override_sdpa() as override:
        out = F.scaled_dot_product_attention(tensors[1][0], x, x, tensors[1][1])
        out.square().sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(tensors[1][0], x, x)
        with torch.inference_mode():
            F.scaled_dot_product_attention(tensors[1][0], x, x)
    for theirs, mine in zip(*tensors, strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad)
    assert override.report().computed == 3
    assert override.report().delegated == {}


def test_dropout_follows_the_generator(x):
    with override_sdpa() as override:
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.manual_seed(0)
    by_head = x.transpose(-2, -3)
    expected = subquad.attention(by_head, by_head, by_head, dropout_p=0.5).transpose(-2, -3)
    torch.testing.assert_close(outs[0], expected)
    assert (override.report().computed, override.report().delegated) == (3, {})


def test_all_dropped_is_torchs(x):
    with override_sdpa() as override:
        assert not F.scaled_dot_product_attention(x, x, x, dropout_p=1.0).any()
    assert [one for one in override.report().delegated if "dropout_p" in one]


def test_errors_are_torchs(x):
    calls = [
        ((x, x[..., :4], x), {}),
        ((x, x, x), {"attn_mask": torch.ones(9, 9, dtype=torch.bool), "is_causal": True}),
        ((x, x.double(), x), {}),
        ((x.int(), x.int(), x.int()), {}),
        ((x.numpy(), x.numpy(), x.numpy()), {}),
        ((x, x), {}),
        ((x, x, x, None, 0.0, False, 0.5), {}),
        ((x, x, x), {"window": 3}),
    ]
    for args, options in calls:
        with pytest.raises((RuntimeError, TypeError)) as expected:
            ORIGINAL(*args, **options)
        with override_sdpa(), pytest.raises(expected.type) as caught:
            F.scaled_dot_product_attention(*args, **options)
        assert str(caught.value).splitlines()[0] == str(expected.value).splitlines()[0]
        assert caught.value.__context__ is None


@pytest.mark.parametrize("of", ["none", "bool", "float"])
def test_autocast_casts_as_torch_does(of, x):
    mask = {
        "none": None,
        "bool": torch.ones(9, 9, dtype=torch.bool).tril(),
        "float": torch.full((9, 9), 0.123),
    }[of]
    with torch.autocast("cpu", torch.bfloat16):
        expected = ORIGINAL(x, x, x, mask)
        with override_sdpa() as override:
            out = F.scaled_dot_product_attention(x, x, x, mask)
        assert out.dtype == expected.dtype == torch.bfloat16
        double = ORIGINAL(x.double(), x.double(), x.double())
        with override_sdpa():
            assert F.scaled_dot_product_attention(x.double(), x.double(), x.double()).dtype == double.dtype
    assert override.report().computed == 1
    half = x.bfloat16()
    assert torch.equal(out, ours(half, attn_mask=mask.bfloat16() if of == "float" else mask))


def test_fake_tensors_and_dispatch_modes(x):
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    with override_sdpa() as override:
        with FakeTensorMode():
            fake = torch.randn(2, 3, 9, 8)
            assert F.scaled_dot_product_attention(fake, fake, fake).shape == fake.shape
        # Outside of its mode as well.
        assert F.scaled_dot_product_attention(fake, fake, fake).shape == fake.shape
        with FlopCounterMode(display=False) as counter:
            F.scaled_dot_product_attention(x, x, x)
        assert counter.get_total_flops() > 0
        graph = make_fx(lambda q: F.scaled_dot_product_attention(q, q, q))(x)
    assert any("attention" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x + 1), ORIGINAL(x + 1, x + 1, x + 1))
    assert override.report().computed == 0
    assert sum(override.report().delegated.values()) == 4


def test_function_modes(x):
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with override_sdpa() as override, Spy():
        F.scaled_dot_product_attention(x, x, x)
    assert ORIGINAL in seen
    assert override.report().computed == 0


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms(x):
    with override_sdpa() as override:
        batched = torch.vmap(lambda q: F.scaled_dot_product_attention(q, q, q))(x)
        gradient = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum())(x)
    torch.testing.assert_close(batched, ORIGINAL(x, x, x))
    torch.testing.assert_close(gradient, torch.func.grad(lambda q: ORIGINAL(q, q, q).sum())(x))
    assert override.report().delegated == {"a torch.func transform is active": 2}


# PyTorch scripts its own decompositions when it makes the first dual tensor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_forward_mode_differentiation(x):
    from torch.autograd import forward_ad

    def tangent(function):
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(function(dual, x, x)).tangent

    expected = tangent(ORIGINAL)
    assert expected is not None
    with override_sdpa() as override:
        out = tangent(F.scaled_dot_product_attention)
    assert torch.equal(out, expected)
    assert override.report().delegated == {"forward-mode differentiation is active": 1}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
def test_traced_modules_contain_the_operator(x):
    with override_sdpa() as override:
        traced = torch.jit.trace(lambda q: F.scaled_dot_product_attention(q, q, q), x)
    assert "aten::scaled_dot_product_attention" in str(traced.graph)
    assert torch.equal(traced(x + 1), ORIGINAL(x + 1, x + 1, x + 1))
    assert set(override.report().delegated) == {"torch.jit.trace is active"}


def test_compiled_code_contains_the_operator(x):
    torch.compiler.reset()

    def function(q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True) * 2

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    with override_sdpa() as override:
        inside = compiled(x)
        report = override.report()
    assert torch.equal(inside, ORIGINAL(x, x, x, is_causal=True) * 2)
    assert report.compiled
    assert report.computed == 0
    assert "torch.compile" in str(report)
    # Compiled code does not outlive the block in what it calls.
    assert torch.equal(compiled(x), inside)
    torch.compiler.reset()


def test_exported_programs_contain_the_operator(x):
    class Module(torch.nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    with override_sdpa():
        program = torch.export.export(Module(), (x,))
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)


def test_exceptions_restore(x):
    with pytest.raises(ZeroDivisionError), override_sdpa():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is ORIGINAL


def test_nested_blocks(x):
    with override_sdpa() as outer:
        function = F.scaled_dot_product_attention
        with override_sdpa() as inner:
            # One function, not two on top of each other.
            assert F.scaled_dot_product_attention is function
            F.scaled_dot_product_attention(x, x, x)
        assert F.scaled_dot_product_attention is function
        F.scaled_dot_product_attention(x, x, x)
    assert (outer.report().computed, inner.report().computed) == (2, 1)
    assert not inner.report().active


def test_blocks_that_do_not_nest(x):
    # As those of two threads need not.
    first, second = override_sdpa(), override_sdpa()
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is not ORIGINAL
    F.scaled_dot_product_attention(x, x, x)
    second.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is ORIGINAL
    assert (one.report().computed, two.report().computed) == (0, 1)


def test_a_block_runs_again_as_a_decorator(x):
    @override_sdpa()
    def function():
        return F.scaled_dot_product_attention(x, x, x)

    assert torch.equal(function(), ours(x))
    assert torch.equal(function(), ours(x))


def test_what_was_there_before_is_put_back(monkeypatch, x):
    calls = []

    def theirs(*args, **options):
        calls.append(args)
        return ORIGINAL(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", theirs)
        with override_sdpa():
            F.scaled_dot_product_attention(x, x, x)
            assert not calls
            # What is delegated goes to what was there.
            F.scaled_dot_product_attention(*wide(x)[0])
            assert len(calls) == 1
        assert F.scaled_dot_product_attention is theirs


@pytest.mark.parametrize("wraps", [False, True])
def test_a_replacement_meanwhile_stays(wraps, x):
    with override_sdpa() as override:
        function = F.scaled_dot_product_attention

        def theirs(*args, **options):
            return function(*args, **options)

        # With `wraps` it has all attributes of subquad's function.
        theirs = functools.wraps(function)(theirs) if wraps else theirs
        F.scaled_dot_product_attention = theirs
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), ours(x))
    assert F.scaled_dot_product_attention is theirs
    # What it wraps is no longer subquad's business.
    assert torch.equal(theirs(x, x, x), ORIGINAL(x, x, x))
    assert override.report().computed == 1
    # A new block comes on top, and goes.
    with override_sdpa() as again:
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), ours(x))
        wider = wide(x)[0]
        assert torch.equal(F.scaled_dot_product_attention(*wider), ORIGINAL(*wider))
    assert F.scaled_dot_product_attention is theirs
    assert again.report().computed == 1
    assert override.report().computed == 1
    F.scaled_dot_product_attention = ORIGINAL


def test_a_replacement_that_puts_subquads_function_back(x):
    with override_sdpa():
        function = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = ORIGINAL
    F.scaled_dot_product_attention = function
    # It is PyTorch's by another name, until a block ends.
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), ORIGINAL(x, x, x))
    with override_sdpa():
        assert torch.equal(F.scaled_dot_product_attention(x, x, x), ours(x))
    assert F.scaled_dot_product_attention is ORIGINAL


def test_nested_blocks_around_a_replacement(x):
    with override_sdpa() as outer:
        function = F.scaled_dot_product_attention

        def theirs(*args, **options):
            return function(*args, **options)

        F.scaled_dot_product_attention = theirs
        with override_sdpa() as inner:
            assert torch.equal(F.scaled_dot_product_attention(x, x, x), ours(x))
        assert F.scaled_dot_product_attention is theirs
        F.scaled_dot_product_attention = function
    assert (outer.report().computed, inner.report().computed) == (0, 1)


def test_many_threads(x):
    expected = ours(x)
    ready, failures = threading.Barrier(8), []

    def work():
        ready.wait()
        for _ in range(50):
            with override_sdpa() as override:
                if not torch.equal(F.scaled_dot_product_attention(x, x, x), expected):
                    failures.append("wrong result")
            if override.report().computed < 1:
                failures.append("not counted")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_other_threads_are_reached(x):
    results = []
    with override_sdpa() as override:
        thread = threading.Thread(target=lambda: results.append(F.scaled_dot_product_attention(x, x, x)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], ours(x))
    assert override.report().computed == 1


def test_the_report_is_a_snapshot_and_reads_well(x):
    with override_sdpa() as override:
        F.scaled_dot_product_attention(x, x, x)
        before = override.report()
        for _ in range(2):
            F.scaled_dot_product_attention(*negated(x)[0])
        F.scaled_dot_product_attention(*wide(x)[0])
    assert (before.computed, before.delegated) == (1, {})
    lines = str(override.report()).splitlines()
    assert lines[0] == "scaled_dot_product_attention: no longer overridden by subquad"
    assert lines[1] == "  computed by subquad: 1"
    assert lines[2] == "  delegated to torch: 2: a negated view"
    assert lines[3].startswith("  delegated to torch: 1: subquad refuses it: query: head_dim 1032")
    assert str(before).splitlines()[0] == "scaled_dot_product_attention: overridden by subquad"


def test_reasons_do_not_fill_memory(x):
    with override_sdpa() as override:
        for length in range(100):
            with pytest.raises(RuntimeError):
                F.scaled_dot_product_attention(x, x, x, torch.zeros(length + 10, 9))
    report = override.report()
    assert len(report.delegated) <= 65
    assert sum(report.delegated.values()) == 100


def test_a_wrong_environment_is_an_error_at_once(run_python):
    code = """
        import subquad.torch
        try:
            with subquad.torch.override_sdpa():
                print("unreachable")
        except ValueError as error:
            print(error)
    """
    assert "SUBQUAD_ISA: expected one of" in run_python(code, SUBQUAD_ISA="sse9")
