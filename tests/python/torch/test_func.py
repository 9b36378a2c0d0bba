"""Transforms of `torch.func`: right, or refused."""

import pytest
import torch
from torch.func import functionalize, grad, jacrev, jvp, vjp, vmap

import subquad
from subquad import masks

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def qkv():
    """Queries, keys and values."""
    return [draw(*shape, seed=seed) for seed, shape in enumerate(((2, 5, 4, 4), (2, 7, 2, 4), (2, 7, 2, 3)))]


def loss(q, k, v, **options):
    out, lse = subquad.attention(q, k, v, return_lse=True, causal=True, **options)
    return out.square().sum() + lse.sin().sum()


def autograd(inputs, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves, **options), leaves)


def test_grad(qkv):
    found = grad(loss, argnums=(0, 1, 2))(*qkv)
    torch.testing.assert_close(found, autograd(qkv), rtol=0, atol=0)
    # What is not differentiated is a constant, with or without requires_grad.
    assert torch.equal(grad(loss)(qkv[0], *(x.clone().requires_grad_() for x in qkv[1:])), found[0])
    assert not grad(lambda x: x.sum() + loss(*qkv))(torch.ones(3)).sub(1).any()


def test_grad_of_options(qkv):
    bias = draw(5, 7, seed=5)
    found = grad(lambda b: loss(*qkv, bias=b, window_size=torch.tensor([[2, 0]] * 4)))(bias)
    leaf = bias.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*qkv, bias=leaf, window_size=(2, 0)), leaf)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 1), (2, 0, None)])
def test_vmap(in_dims, qkv):
    stacked = [
        x if dim is None else torch.stack([x, 2 * x, x + 1], dim) for x, dim in zip(qkv, in_dims, strict=True)
    ]
    found = vmap(lambda q, k, v: subquad.attention(q, k, v, causal=True, return_lse=True), in_dims)(*stacked)
    for index in range(3):
        one = [x if dim is None else x.select(dim, index) for x, dim in zip(stacked, in_dims, strict=True)]
        expected = subquad.attention(*one, causal=True, return_lse=True)
        assert all(torch.equal(x[index], y) for x, y in zip(found, expected, strict=True))


def test_vmap_of_options(qkv):
    biases = draw(3, 5, 7, seed=5)
    found = vmap(lambda bias: subquad.attention(*qkv, bias=bias, mask=masks.causal()))(biases)
    expected = [subquad.attention(*qkv, bias=bias, causal=True) for bias in biases]
    assert torch.equal(found, torch.stack(expected))


def test_gradients_of_each_element(qkv):
    stacked = [torch.stack([x, 2 * x, x + 1]) for x in qkv]
    found = vmap(grad(loss, argnums=(0, 1, 2)))(*stacked)
    for index in range(3):
        expected = autograd([x[index] for x in stacked])
        assert all(torch.equal(x[index], y) for x, y in zip(found, expected, strict=True))


def test_vmap_under_autograd(qkv):
    leaves = [torch.stack([x, 2 * x]).requires_grad_() for x in qkv]
    found = torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves)
    for index in range(2):
        expected = autograd([x[index] for x in leaves])
        assert all(torch.equal(x[index], y) for x, y in zip(found, expected, strict=True))


def test_jacobian_in_reverse_mode(qkv):
    q, k, v = (x[:1, :3] for x in qkv)

    def function(q):
        return subquad.attention(q, k, v)[0, :, 0]

    jacobian = jacrev(function)(q)
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.functional.jacobian(function, leaf)
    torch.testing.assert_close(jacobian, expected)


def test_vjp(qkv):
    (out, lse), pull = vjp(lambda q: subquad.attention(q, *qkv[1:], return_lse=True), qkv[0])
    (found,) = pull((torch.ones_like(out), torch.zeros_like(lse)))
    leaf = qkv[0].clone().requires_grad_()
    assert torch.equal(found, torch.autograd.grad(subquad.attention(leaf, *qkv[1:]).sum(), leaf)[0])


def test_functionalize(qkv):
    found = functionalize(lambda q: subquad.attention(q.mul_(2), *qkv[1:]))(qkv[0].clone())
    assert torch.equal(found, subquad.attention(qkv[0] * 2, *qkv[1:]))


def test_scaled_dot_product_attention(qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv)

    def function(q, k, v):
        return subquad.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sin().sum()

    found = vmap(grad(function), (0, None, None))(torch.stack([q, 2 * q]), k, v)
    for index in range(2):
        leaf = ((index + 1) * q).requires_grad_()
        torch.testing.assert_close(found[index], torch.autograd.grad(function(leaf, k, v), leaf)[0])


def test_forward_mode_of_functionalized_calls_is_refused(qkv):
    with pytest.raises(NotImplementedError, match=r"subquad::attention: forward-mode derivatives \(jvp\)"):
        jvp(functionalize(lambda q: loss(q, *qkv[1:])), (qkv[0],), (qkv[0],))


def test_results_in_given_memory_are_refused(qkv):
    with pytest.raises(RuntimeError, match="functions with out="):
        grad(lambda q: subquad.attention(q, *qkv[1:], out=torch.empty(2, 5, 4, 3).double()).sum())(qkv[0])
    with pytest.raises(NotImplementedError, match="out: not supported"):
        vmap(lambda q: subquad.attention(q, *qkv[1:], out=torch.empty(2, 5, 4, 3).double()))(qkv[0][None])
