"""Gradients of attention through autograd, on the extension itself."""

import gc
import re
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import subquad
from subquad import masks, normalizers
from subquad.torch.attention_operators import ATTENTION
from subquad.torch.functions import apply


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def qkv():
    """Queries, keys and values that require grad."""
    shapes = ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6))
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def test_gradcheck(feature):
    learned = feature.learned()
    inputs = [x.requires_grad_() for x in (*feature.inputs(), *learned.values())]

    def function(q, k, v, *rest):
        options = feature.options | dict(zip(learned, rest, strict=True))
        out, lse = subquad.attention(q, k, v, return_lse=True, **options)
        # A row that sees no key has no finite one.
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert gradcheck(function, inputs)


def test_relu_normalizer_away_from_its_corner():
    q, k, v = (draw(1, n, 2, 4, seed=n, dtype=torch.float64).abs().requires_grad_() for n in (3, 4, 5))
    normalizer = normalizers.ReLU(power=2.0)
    assert gradcheck(lambda q, k, v: subquad.attention(q, k, v[:, :4], normalizer=normalizer), (q, k, v))


def test_gradients_are_those_of_attention_backward(qkv):
    options = {"causal": True, "window_size": (3, 0), "softcap": 4.0}
    out, lse = subquad.attention(*qkv, return_lse=True, **options)
    d_out, d_lse = draw(*out.shape, seed=7), draw(*lse.shape, seed=8)
    found = torch.autograd.grad([out, lse], qkv, [d_out, d_lse])
    arrays = [x.detach() for x in (d_out, *qkv, out, lse)]
    expected = subquad.attention_backward(*arrays, dlse=d_lse, **options)
    assert all(map(torch.equal, found, expected))


def test_the_result_is_the_same_bits_with_and_without_gradients(feature):
    inputs, learned = feature.inputs(torch.float32), feature.learned()
    learned = {name: x.float() for name, x in learned.items()}
    plain = subquad.attention(*inputs, return_lse=True, **feature.options, **learned)
    inputs = [x.requires_grad_() for x in inputs]
    graded = subquad.attention(*inputs, return_lse=True, **feature.options, **learned)
    assert all(map(torch.equal, plain, graded))
    assert all(x.requires_grad for x in graded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_argument(dtype):
    q, k, v = (draw(2, n, 2, 8, seed=n, dtype=dtype).requires_grad_() for n in (5, 7, 7))
    options = {
        "bias": draw(5, 7, seed=1).requires_grad_(),
        "relative_bias": draw(1, 11, seed=2, dtype=dtype).requires_grad_(),
        "alibi_slopes": draw(2, seed=3).abs().requires_grad_(),
        "sinks": draw(2, seed=4, dtype=dtype).requires_grad_(),
    }
    tensors = [q, k, v, *options.values()]
    found = torch.autograd.grad(subquad.attention(q, k, v, **options).sum(), tensors)
    assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    named = dict(zip(options, wide[3:], strict=True))
    expected = torch.autograd.grad(subquad.attention(*wide[:3], **named).sum(), wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.03, atol=0.03 * float(other.abs().max()))


@pytest.mark.parametrize("names", ["q", "k", "v", "qk", "kv"])
def test_only_what_is_wanted(names, qkv):
    for name, x in zip("qkv", qkv, strict=True):
        x.requires_grad_(name in names)
    subquad.attention(*qkv).sum().backward()
    assert [x.grad is not None for x in qkv] == [name in names for name in "qkv"]


def test_no_graph_where_nothing_requires_grad(qkv):
    assert subquad.attention(*(x.detach() for x in qkv)).grad_fn is None
    with torch.no_grad():
        assert subquad.attention(*qkv).grad_fn is None
    with torch.inference_mode():
        assert subquad.attention(*qkv).grad_fn is None
    assert type(subquad.attention(*qkv).grad_fn).__name__ == "SubquadAttentionBackward"


def test_a_tensor_as_all_three():
    x = draw(1, 6, 2, 8).requires_grad_()
    subquad.attention(x, x, x, causal=True).square().sum().backward()
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    subquad.attention(*copies, causal=True).square().sum().backward()
    torch.testing.assert_close(x.grad, sum(copy.grad for copy in copies))


def test_outputs_used_twice(qkv):
    out, lse = subquad.attention(*qkv, return_lse=True)
    twice = torch.autograd.grad(out.square().sum() + out.sum() + lse.sum() + 2 * lse.sum(), qkv)
    out, lse = subquad.attention(*qkv, return_lse=True)
    once = torch.autograd.grad((out.square() + out).sum() + 3 * lse.sum(), qkv)
    torch.testing.assert_close(twice, once)


def test_only_the_lse_is_used(qkv):
    _, lse = subquad.attention(*qkv, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), qkv, materialize_grads=True)
    q, k, _v = (x.detach().requires_grad_() for x in qkv)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 8**-0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected)
    assert not dv.any()


@pytest.mark.parametrize(
    "form",
    [
        lambda g: g[:1, :1, :1, :1].expand(g.shape),
        lambda g: g.transpose(1, 3).contiguous().transpose(1, 3),
        lambda g: torch.stack([g, g], -1)[..., 0],
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_gradients_of_any_strides(form, qkv):
    g = form(draw(2, 5, 4, 6, seed=9))
    found = torch.autograd.grad(subquad.attention(*qkv), qkv, g)
    expected = torch.autograd.grad(subquad.attention(*qkv), qkv, g.contiguous())
    assert all(map(torch.equal, found, expected))


def test_strided_arguments(qkv):
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv)
    out = subquad.attention(*(x.transpose(1, 2) for x in (q, k, v)))
    out.sum().backward()
    expected = torch.autograd.grad(subquad.attention(*qkv).sum(), qkv)
    assert all(torch.equal(x.grad.transpose(1, 2), y) for x, y in zip((q, k, v), expected, strict=True))


def test_retain_graph(qkv):
    out = subquad.attention(*qkv).sum()
    first = torch.autograd.grad(out, qkv, retain_graph=True)
    second = torch.autograd.grad(out, qkv)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, qkv)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "sinks", "scale", "length_scale", "out"])
def test_changes_before_the_backward_are_found_out(name, qkv):
    tensors = dict(zip("qkv", [x.detach().clone() for x in qkv], strict=True))
    tensors["q"].requires_grad_(name != "q")
    tensors["k"].requires_grad_(name == "q")
    options = {
        "bias": {"bias": torch.zeros(5, 7)},
        "mask": {"bias": torch.ones(5, 7, dtype=torch.bool)},
        "sinks": {"sinks": torch.zeros(4)},
        "scale": {"scale": torch.ones(5)},
        "length_scale": {"length_scale": torch.ones(8)},
    }.get(name, {})
    out = subquad.attention(**tensors, **options)
    changed = {**tensors, **options, "mask": options.get("bias"), "out": out}[name]
    with torch.no_grad():
        changed.copy_(torch.zeros_like(changed))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_window_table_may_change_after_the_call(qkv):
    table = torch.tensor([[2, 0], [1, 1], [0, 0], [-1, -1]])
    expected = torch.autograd.grad(subquad.attention(*qkv, window_size=table.clone()).sum(), qkv)
    out = subquad.attention(*qkv, window_size=table)
    table.zero_()
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), qkv), expected))


def test_results_are_freed_with_the_graph(qkv):
    gc.disable()
    try:
        out = subquad.attention(*qkv)
        held = weakref.ref(out)
        out.sum().backward()
        del out
        assert held() is None
    finally:
        gc.enable()


def test_hooks_on_saved_tensors(qkv):
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.numpy(force=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        out = subquad.attention(*qkv)
    # Queries, keys, values, the result and the log-sum-exp: nothing of the size of the scores.
    assert sorted(packed) == sorted([*(x.shape for x in qkv), out.shape, (2, 4, 5)])
    found = torch.autograd.grad(out.sum(), qkv)
    assert all(map(torch.equal, found, torch.autograd.grad(subquad.attention(*qkv).sum(), qkv)))


def test_threads(qkv):
    def gradients():
        return torch.autograd.grad(subquad.attention(*qkv, causal=True).square().sum(), qkv)

    expected, found = gradients(), []
    threads = [threading.Thread(target=lambda: found.append(gradients())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(all(map(torch.equal, one, expected)) for one in found)


@pytest.mark.parametrize("name", ["scale", "length_scale", "softcap"])
def test_gradients_that_are_not_there(name):
    q, k, v = (draw(2, n, 4, 8, seed=n) for n in (5, 7, 7))
    value = {"scale": torch.ones(5), "length_scale": torch.ones(8), "softcap": torch.tensor(2.0)}[name]
    value.requires_grad_()
    for queries in (q, q.clone().requires_grad_()):
        with pytest.raises(NotImplementedError, match=rf"\b{name}: its gradient is not implemented"):
            subquad.attention(queries, k, v, **{name: value})
    with torch.no_grad():
        expected = subquad.attention(q, k, v, **{name: value})
    assert torch.equal(subquad.attention(q, k, v, **{name: value.detach()}), expected)


def test_numbers_of_normalizers_have_no_gradient():
    with pytest.raises(NotImplementedError, match="bias: the gradient of a normalizer's number"):
        normalizers.Sigmoid(bias=torch.tensor(1.0, requires_grad=True))


def test_out_is_refused_as_pytorch_does(qkv):
    out = torch.empty(2, 5, 4, 6)
    message = "functions with out=... arguments don't support automatic differentiation"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.mul(qkv[0], 2, out=torch.empty_like(qkv[0]))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        subquad.attention(*qkv, out=out)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        subquad.attention(*(x.detach() for x in qkv), out=out.clone().requires_grad_())
    with torch.no_grad():
        assert subquad.attention(*qkv, out=out) is out


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 7, 2, 9)}, ValueError, "k: "),
        ({"k": np.zeros((2, 7, 2, 8), np.float32)}, TypeError, "k: expected a PyTorch tensor"),
        ({"v": torch.zeros(2, 7, 2, 6).half()}, TypeError, "v: expected dtype float32"),
        ({"bias": torch.zeros(3)}, ValueError, "bias: "),
        ({"softcap": -1.0}, ValueError, "softcap: "),
        ({"mask": "causal"}, TypeError, "mask: "),
        ({"sinks": torch.zeros(4), "normalizer": normalizers.Softplus()}, ValueError, "sinks: "),
        ({"q": torch.zeros(2, 5, 2, 2000), "k": torch.zeros(2, 7, 2, 2000)}, NotImplementedError, "2000"),
    ],
)
def test_errors_are_those_without_gradients(change, error, message, qkv):
    arguments = dict(zip("qkv", qkv, strict=True)) | change
    with torch.no_grad(), pytest.raises(error, match=message) as plain:
        subquad.attention(**arguments)
    with pytest.raises(error, match=message) as graded:
        subquad.attention(**arguments)
    assert str(graded.value) == str(plain.value)


def test_reweighting_has_no_gradient(qkv):
    out = subquad.attention(*qkv, normalizer=normalizers.Softplus(reweight=3))
    with pytest.raises(NotImplementedError, match=r"normalizer: the gradient of Softplus\(reweight=\.\.\.\)"):
        out.sum().backward()


def test_rows_that_see_nothing_have_no_gradient():
    q, k, v = (draw(1, n, 2, 4, seed=n).requires_grad_() for n in (6, 3, 3))
    k.data[:, 2], v.data[:, 2] = torch.nan, torch.nan
    out = subquad.attention(q, k, v, causal=True, mask=masks.padding([2]))
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert not dq[:, :3].any()
    assert dq[:, 5].any()
    assert not dk[:, 2].any()
    assert not dv[:, 2].any()


@pytest.mark.parametrize(
    "shapes", [((0, 5, 2, 4), (0, 3, 2, 4)), ((1, 0, 2, 4), (1, 3, 2, 4)), ((1, 5, 2, 4), (1, 0, 2, 4))]
)
def test_empty(shapes):
    q, k = (torch.ones(shape, requires_grad=True) for shape in shapes)
    dq, dk = torch.autograd.grad(subquad.attention(q, k, k).sum(), (q, k))
    assert (dq.shape, dk.shape) == (q.shape, k.shape)
    assert not dq.any()
    assert not dk.any()


def test_functions_hold_no_options_that_are_tensors(plain_options, qkv):
    bias = torch.zeros(5, 7)
    out, _ = apply(ATTENTION, qkv, plain_options | {"bias": bias}, ["bias"])
    held = weakref.ref(bias)
    node = out.grad_fn
    del bias, out
    # What hooks on saved tensors have taken away must be gone.
    assert node.options["bias"] is None
    assert held() is not None
