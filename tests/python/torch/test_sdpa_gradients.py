"""Gradients of `scaled_dot_product_attention` against PyTorch's, on the samples that PyTorch tests its own function with."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch.autograd import gradcheck
from torch.testing._internal.common_methods_invocations import op_db

import subquad

(OPERATOR,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def gradients(function, tensors, options, d_out):
    names = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    learned = {
        name: options[name].detach().clone().requires_grad_(options[name].is_floating_point())
        for name in names
    }
    out = function(*leaves, **{**options, **learned})
    wanted = [x for x in (*leaves, *learned.values()) if x.requires_grad]
    return out, torch.autograd.grad(out, wanted, d_out(out))


def assert_gradients_are_those_of_torch(tensors, options):
    generator = torch.Generator().manual_seed(0)
    drawn = []

    def d_out(out):
        if not drawn:
            drawn.append(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
        return drawn[0]

    out, found = gradients(subquad.scaled_dot_product_attention, tensors, options, d_out)
    theirs, expected = gradients(F.scaled_dot_product_attention, tensors, options, d_out)
    assert out.shape == theirs.shape
    assert [x.shape for x in found] == [x.shape for x in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        assert torch.equal(out, subquad.scaled_dot_product_attention(*tensors, **options))


def test_samples():
    torch.manual_seed(0)
    samples = list(OPERATOR.sample_inputs("cpu", torch.float64, requires_grad=True))
    plain = [sample for sample in samples if not sample.kwargs.get("dropout_p")]
    assert len(plain) >= 10
    for sample in plain:
        options = {name: value for name, value in sample.kwargs.items() if name != "dropout_p"}
        assert_gradients_are_those_of_torch((sample.input, *sample.args), options)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((5, 4), (7, 4), (7, 3)), {}),
        (((2, 5, 4), (2, 7, 4), (2, 7, 3)), {"is_causal": True}),
        (((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 3)), {"is_causal": True}),
        (((2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 3)), {"scale": 0.3}),
        (((2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)), {"enable_gqa": True}),
        (((2, 4, 5, 4), (2, 2, 7, 4), (2, 1, 7, 3)), {"enable_gqa": True}),
        (((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)), {}),
        (((2, 3, 2, 5, 4), (3, 2, 7, 4), (1, 1, 2, 7, 3)), {"attn_mask": draw(3, 1, 5, 7, seed=9)}),
        (((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 3)), {"attn_mask": draw(2, 1, 2, 5, 7, seed=9)}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)), {"attn_mask": draw(1, 7, seed=9)}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)), {"attn_mask": draw(2, 1, 5, 1, seed=9)}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)), {"attn_mask": draw(5, 7, seed=9) > 0}),
    ],
)  # fmt: skip
def test_forms(shapes, options):
    tensors = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    if options.get("enable_gqa") and shapes[1][1] != shapes[2][1]:
        # PyTorch wants as many value heads as key heads.
        inputs = [x.requires_grad_() for x in tensors]
        assert gradcheck(lambda *x: subquad.scaled_dot_product_attention(*x, **options), inputs)
        return
    assert_gradients_are_those_of_torch(tensors, options)


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((2, 4, 5, 8), (2, 2, 5, 8), (2, 4, 5, 8)), None, "key: .* 4 heads as query has"),
        (((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), None, "enable_gqa=True"),
        (((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 4, 8)), None, "value: .* length 5 as key has"),
        (((2, 4, 5, 8), (2, 4, 5, 7), (2, 4, 5, 8)), None, "key: .* head_dim 8 as query has"),
        (((8,), (8,), (8,)), None, "query: .* rank 2 or more"),
        (((2, 4, 5, 8), (3, 4, 5, 8), (2, 4, 5, 8)), None, "key: .* leading axes"),
        (((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8)), torch.ones(9, 9), "attn_mask: .* broadcasts"),
        (((3, 2, 4, 5, 8),) * 3, torch.ones(2, 2, 4, 5, 5), "attn_mask: .* broadcasts"),
    ],
)
def test_errors_have_the_names_of_the_signature(shapes, mask, message):
    query, key, value = (torch.zeros(shape) for shape in shapes)
    for queries in (query, query.clone().requires_grad_()):
        with pytest.raises(ValueError, match=message):
            subquad.scaled_dot_product_attention(queries, key, value, mask)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dropout_follows_the_generator(requires_grad):
    tensors = [draw(2, 3, 5, 8, seed=seed).requires_grad_(requires_grad) for seed in range(3)]

    def gradients(function, order):
        torch.manual_seed(1)
        inputs = [x.transpose(1, 2) for x in tensors] if order else tensors
        out = function(*inputs, dropout_p=0.5)
        out = out.transpose(1, 2) if order else out
        return (out, *torch.autograd.grad(out.sin().sum(), tensors)) if requires_grad else (out,)

    found = gradients(subquad.scaled_dot_product_attention, order=False)
    torch.testing.assert_close(found, gradients(subquad.attention, order=True))


def test_wrong_probabilities_and_arrays_without_a_generator_are_refused():
    x = torch.zeros(2, 3, 5, 8)
    with pytest.raises(ValueError, match="dropout_p: expected a number from 0 to below 1, got 1"):
        subquad.scaled_dot_product_attention(x, x, x, dropout_p=1.0)
    with pytest.raises(NotImplementedError, match="dropout_p: dropout with probability"):
        subquad.scaled_dot_product_attention(*[x.numpy()] * 3, dropout_p=0.5)


def test_two_masks_are_refused():
    x = torch.zeros(2, 3, 5, 8, requires_grad=True)
    with pytest.raises(ValueError, match="attn_mask: expected None when is_causal=True"):
        subquad.scaled_dot_product_attention(x, x, x, torch.zeros(5, 5), is_causal=True)
