"""Gradients of short convolutions, and the ways in which PyTorch meets them."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from subquad import ops
from subquad.torch import library
from subquad.torch.convolution_operators import CAUSAL_CONV1D, CAUSAL_CONV1D_BACKWARD
from subquad.torch.schema_values import carried

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning",
    "ignore:.*torch.jit.script:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
B, D, T = 2, 5, 9


def draw(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def channels_last(x):
    return x.detach().swapaxes(1, 2).contiguous().swapaxes(1, 2).requires_grad_(x.requires_grad)


def by_pytorch(x, weight, bias, states, activation):
    """Outputs and states of `[B, D, T]` by operators of PyTorch."""
    line = torch.cat([states, x], dim=-1)
    taps, length = weight.shape[1], x.shape[-1]
    y = bias[:, None] + sum(weight[:, j : j + 1] * line[..., j : j + length] for j in range(taps))
    last = line[..., line.shape[-1] - states.shape[-1] :]
    return (y if activation is None else torch.nn.functional.silu(y)), last


@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["tokens", "channels"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("length", [0, 1, 2, 9, 40])
def test_gradients(length, taps, activation, layout):
    x, weight, bias = layout(draw(B, D, length)), draw(D, taps), draw(D)
    states = draw(B, D, taps - 1, seed=1)
    inputs = (x, weight, bias, states)
    out, last = ops.causal_conv1d_fn(x, weight, bias, None, states, True, None, activation)
    expected, expected_last = by_pytorch(*inputs, activation)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, expected_last)
    assert length < 2 or out.stride() == x.stride()
    for results, wanted in (
        ((out, last), (expected, expected_last)),
        ((out,), (expected,)),
        ((last,), (expected_last,)),
    ):
        if not wanted[0].requires_grad or not wanted[0].numel():
            continue
        seeds = [draw(*one.shape, seed=2, grad=False) for one in wanted]
        found = torch.autograd.grad(results, inputs, seeds, retain_graph=True)
        gradients = torch.autograd.grad(wanted, inputs, seeds, retain_graph=True, allow_unused=True)
        for one, gradient, of in zip(found, gradients, inputs, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(of) if gradient is None else gradient)


@pytest.mark.parametrize("form", ["rows", "numbers", "packed"])
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["tokens", "channels"])
def test_gradcheck(layout, form):
    x, weight, bias = layout(draw(1, D, T)), draw(D, 3), draw(D)
    numbers = torch.tensor([[0, 0, 3, 3, 3, -1, -1, 5, 5]], dtype=torch.int32) if form == "numbers" else None
    if form != "packed":
        states = draw(1, D, 2, seed=1)
        assert gradcheck(
            lambda x, w, b, s: ops.causal_conv1d_fn(x, w, b, numbers, s, True, None, "silu"),
            (x, weight, bias, states),
        )
        return
    bounds, states, residual = torch.tensor([0, 1, 1, 6, 9]), draw(4, D, 3, seed=1), draw(1, T, D, seed=2)
    assert gradcheck(
        lambda x, w, b, r, s: ops.causal_conv1d(
            x.swapaxes(1, 2), w, b, r, s, True, "silu", cu_seqlens=bounds
        ),
        (x, weight, bias, residual, states),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["tokens", "channels"])
def test_gradients_of_other_types(layout, wide, dtype):
    of_filters = torch.float32 if wide else dtype
    x, weight, bias = (
        layout(draw(B, 33, 50, dtype=dtype)),
        draw(33, 4, dtype=of_filters),
        draw(33, dtype=of_filters),
    )
    states = draw(B, 33, 3, dtype=of_filters)
    inputs = (x, weight, bias, states)
    out, _ = ops.causal_conv1d_fn(x, weight, bias, None, states, True, None, "silu")
    seed = draw(*out.shape, dtype=dtype, seed=3, grad=False)
    found = torch.autograd.grad(out, inputs, seed)
    exact = [one.detach().double().requires_grad_() for one in inputs]
    expected = torch.autograd.grad(by_pytorch(*exact, "silu")[0], exact, seed.double())
    for one, gradient, of in zip(found, expected, inputs, strict=True):
        assert one.dtype == of.dtype
        limit = 2 * max(torch.finfo(of.dtype).eps, 2e-6) * gradient.abs().max()
        assert (one.double() - gradient).abs().max() <= limit


def test_the_residual_has_the_gradient_of_the_outputs():
    x, weight, residual = draw(B, T, D), draw(D, 4), draw(B, T, D, seed=1)
    out, _ = ops.causal_conv1d(x, weight, None, residual, activation="silu")
    seed = draw(B, T, D, seed=2, grad=False)
    found = torch.autograd.grad(out, [x, residual], seed)
    without, _ = ops.causal_conv1d(x, weight, activation="silu")
    assert torch.equal(found[1], seed)
    assert torch.equal(found[0], torch.autograd.grad(without, x, seed)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_may_change_before_the_backward(compiled):
    # Layers of flash-linear-attention mask padding in place.
    x, weight, mask = draw(B, T, D), draw(D, 4), torch.arange(T)[:, None] > 2

    def masked(in_place):
        out, _ = ops.causal_conv1d(x, weight, activation="silu")
        return out.mul_(mask) if in_place else out * mask

    call = torch.compile(masked, backend="aot_eager") if compiled else masked
    found, wanted = (torch.autograd.grad(out.sum(), (x, weight)) for out in (call(True), masked(False)))
    assert all(map(torch.equal, found, wanted))


def test_threads_do_not_change_bits(keep_num_threads):
    import subquad

    for layout in (channels_last, lambda x: x):
        x, weight = layout(draw(1, 300, 700, dtype=torch.float32)), draw(300, 4, dtype=torch.float32)
        found = []
        for threads in (1, 2, 3):
            subquad.set_num_threads(threads)
            out = ops.causal_conv1d_fn(x, weight, activation="silu")
            found.append(torch.autograd.grad(out.sum(), (x, weight)))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_without_gradients_nothing_is_recorded():
    x, weight = draw(B, D, T), draw(D, 4)
    with torch.no_grad():
        assert not ops.causal_conv1d_fn(x, weight).requires_grad
    out = ops.causal_conv1d_fn(x, weight, activation="silu")
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives"):
        torch.autograd.grad(gradient.sum(), weight)
    with pytest.raises(
        RuntimeError, match=r"functions with final_states_out=... arguments don't support automatic"
    ):
        ops.causal_conv1d_fn(
            x, weight, return_final_states=True, final_states_out=torch.empty(B, D, 3).double()
        )
    with pytest.raises(NotImplementedError, match=r"requires grad"):
        ops.causal_conv1d_update(x, torch.zeros(B, D, 3).double(), weight)


def test_states_of_torch():
    x, weight = draw(B, D, 1, grad=False), draw(D, 4, grad=False)
    state = draw(B, D, 4, grad=False)
    version, moved = state._version, torch.cat([state, x], dim=-1)[..., 1:]
    out = ops.causal_conv1d_update(x, state, weight, None, "silu")
    assert state._version > version
    assert torch.equal(state, moved)
    torch.testing.assert_close(out[..., 0], torch.nn.functional.silu((moved * weight).sum(-1)))
    into = torch.zeros(B, 3, D, dtype=torch.float64).swapaxes(1, 2)
    _, states = ops.causal_conv1d_fn(draw(B, D, T, grad=False), weight, None, None, None, True, into)
    assert states is into
    assert torch.equal(into, draw(B, D, T, grad=False)[..., -3:])


def options(**given):
    plain = dict.fromkeys(CAUSAL_CONV1D.optional) | dict.fromkeys(CAUSAL_CONV1D.others, False)
    return plain | given


CALLS = {
    "plain": options,
    "all": lambda: options(
        bias=draw(D), residual=draw(1, D, T, seed=3), initial_state=draw(1, D, 3), silu=True
    ),
    "packed": lambda: options(
        initial_state=draw(3, D, 4), cu_seqlens=torch.tensor([0, 2, 2, 9]), full_state=True, silu=True
    ),
    "numbers": lambda: options(seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2]])),
}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    given, inputs = CALLS[call](), (draw(1, D, T), draw(D, 4))
    opcheck(library.overload(CAUSAL_CONV1D), carried(CAUSAL_CONV1D, inputs, given))
    detached = {name: one.detach() if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    names = ["x", "weight", "bias", "residual", "initial_state"]
    wrt = [name for name in names if name in {"x", "weight"} or given[name] is not None]
    inputs = [one.detach() for one in inputs]
    out, state = library.call(CAUSAL_CONV1D, inputs, detached)
    for gradients in ((out, None), (None, state), (out, state)):
        arguments = carried(CAUSAL_CONV1D_BACKWARD, (*gradients, *inputs), detached | {"wrt": wrt})
        opcheck(library.overload(CAUSAL_CONV1D_BACKWARD), arguments)


@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["tokens", "channels"])
def test_compiled(layout):
    x, weight, bias = layout(draw(B, D, T)), draw(D, 4), draw(D)
    states = draw(B, D, 3, seed=1)

    def call(x, weight, bias, states):
        out, last = ops.causal_conv1d_fn(x * 2, weight, bias, None, states, True, None, "silu")
        return out.square().sum() + last.sum()

    inputs = (x, weight, bias, states)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*inputs), inputs)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    for one, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(one, gradient)


def test_transforms():
    x, weight = draw(3, B, D, T, grad=False), draw(D, 4, grad=False)

    def loss(x):
        return ops.causal_conv1d_fn(x, weight, activation="silu").sum()

    expected = torch.stack([torch.func.grad(loss)(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    with pytest.raises(NotImplementedError, match=r"forward-mode"):
        torch.func.jvp(loss, (x[0],), (x[0],))


def test_autocast():
    x, weight = draw(B, D, T, dtype=torch.float32), draw(D, 4, dtype=torch.float32)
    expected = ops.causal_conv1d_fn(x.bfloat16(), weight.bfloat16(), activation="silu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.causal_conv1d_fn(x, weight, activation="silu")
        compiled = torch.compile(
            lambda x, weight: ops.causal_conv1d_fn(x, weight, activation="silu"),
            fullgraph=True,
            backend="aot_eager",
        )(x, weight)
    assert torch.equal(out, expected)
    assert torch.equal(compiled, expected)
    gradients = torch.autograd.grad(out.float().sum(), (x, weight))
    assert [one.dtype for one in gradients] == [torch.float32] * 2


def test_bad_input_keeps_its_names():
    x, weight = draw(B, D, T), draw(D, 4)
    with pytest.raises(ValueError, match=r"^initial_states: expected shape \(2, 5, 3\)"):
        ops.causal_conv1d_fn(x, weight, initial_states=draw(B, D, 4))
    with pytest.raises(TypeError, match=r"^bias: expected a PyTorch tensor as x is, got ndarray"):
        ops.causal_conv1d_fn(x, weight, np.ones(D))
