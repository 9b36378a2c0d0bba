"""Gradients of packed sequences, in eager and compiled code."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import subquad
from subquad import flash_attn
from subquad.torch import library
from subquad.torch.attention_operators import ATTENTION_VARLEN
from subquad.torch.schema_values import carried, restored

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
CU_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
CU_K = torch.tensor([0, 4, 6, 9], dtype=torch.int32)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURES = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {}),
    "window": ({"window_size": (2, -1)}, {}),
    "softcap": ({"softcap": 2.0, "softmax_scale": 0.3}, {}),
    "alibi": ({"causal": True}, {"alibi_slopes": draw(4, seed=5).abs()}),
    "sinks": ({"window_size": (1, 1)}, {"sinks": draw(4, seed=6)}),
}


@pytest.fixture(params=FEATURES.values(), ids=FEATURES)
def feature(request):
    """Options, and those with a gradient."""
    return request.param


@pytest.fixture
def qkv():
    """Queries, keys and values of three sequences that require grad."""
    shapes = ((8, 4, 4), (9, 2, 4), (9, 2, 3))
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def packed(feature):
    options, names = feature[0], list(feature[1])

    def function(q, k, v, *rest):
        given = options | dict(zip(names, rest, strict=True))
        out, lse = subquad.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, **given)
        return out, torch.where(lse.isfinite(), lse, 0.0)

    return function


def leaves(feature, qkv):
    return [*qkv, *(x.clone().requires_grad_() for x in feature[1].values())]


def test_gradcheck(feature, qkv):
    assert gradcheck(packed(feature), leaves(feature, qkv))


def test_compiled(feature, qkv):
    torch._dynamo.reset()
    function, inputs = packed(feature), leaves(feature, qkv)
    results = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs)
    assert all(map(torch.equal, *results))
    found = [torch.autograd.grad(out.sum() + lse.sum(), inputs) for out, lse in results]
    assert all(map(torch.equal, *found))


def test_opcheck(feature, qkv):
    options = dict.fromkeys((*ATTENTION_VARLEN.optional, *ATTENTION_VARLEN.others)) | {"causal": False}
    options |= feature[0] | feature[1]
    arguments = carried(ATTENTION_VARLEN, (*qkv, CU_Q, CU_K), options)
    opcheck(library.overload(ATTENTION_VARLEN), arguments)
    back = restored(ATTENTION_VARLEN, arguments)[1]
    assert {name: back[name] for name in feature[0]} == feature[0]


def test_sequences_are_those_of_separate_calls(qkv):
    found = torch.autograd.grad(subquad.attention_varlen(*qkv, CU_Q, CU_K, causal=True).square().sum(), qkv)
    parts = [
        subquad.attention(qkv[0][None, a:b], *(x[None, c:d] for x in qkv[1:]), causal=True).square().sum()
        for a, b, c, d in ((0, 3, 0, 4), (3, 3, 4, 6), (3, 8, 6, 9))
    ]
    torch.testing.assert_close(found, torch.autograd.grad(sum(parts), qkv))


def test_flash_attn(qkv):
    halves = [x.detach().float().requires_grad_() for x in qkv]
    out = flash_attn.flash_attn_varlen_func(*halves, CU_Q, CU_K, 5, 4, causal=True)
    expected = torch.autograd.grad(subquad.attention_varlen(*halves, CU_Q, CU_K, causal=True).sum(), halves)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), halves), expected))


def test_changed_lengths_are_found_out(qkv):
    lengths = CU_Q.clone()
    out = subquad.attention_varlen(*qkv, lengths, CU_K)
    lengths[1] = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_that_are_not_there(qkv):
    q, k, v = qkv
    table = torch.tensor([[0], [1], [2]])
    pages = [x.detach()[:9].reshape(3, 3, *x.shape[1:]) for x in (k, v)]
    lengths = torch.tensor([0, 3, 5, 8], dtype=torch.int32)
    out = subquad.attention_varlen(q, *pages, CU_Q, lengths, block_table=table)
    with pytest.raises(NotImplementedError, match="block_table: gradients"):
        out.sum().backward()
    for name in ("softcap", "softmax_scale"):
        with pytest.raises(NotImplementedError, match=f"{name}: its gradient is not implemented"):
            subquad.attention_varlen(q, k, v, CU_Q, CU_K, **{name: torch.tensor(2.0, requires_grad=True)})
    out = subquad.attention_varlen(q, k, v, CU_Q, CU_K)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_varlen_backward: second derivatives"):
        gradient.sum().backward()


def test_autocast(qkv):
    singles = [x.detach().float().requires_grad_() for x in qkv]
    with torch.autocast("cpu"):
        out = subquad.attention_varlen(*singles, CU_Q, CU_K)
    assert torch.equal(out, subquad.attention_varlen(*(x.bfloat16() for x in singles), CU_Q, CU_K))
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), singles))
