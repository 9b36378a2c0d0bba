"""Second derivatives and forward mode: right wherever they are implemented, refused by name elsewhere."""

import pytest
import torch
from tests.python.torch.conftest import FEATURES
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.library import opcheck

import subquad
from subquad.torch import library
from subquad.torch.attention_operators import ATTENTION, ATTENTION_DOUBLE_BACKWARD, ATTENTION_JVP
from subquad.torch.schema_values import carried

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning"
)
REFUSED = ("softcap", "normalizer", "dropout_p")
CONSTANT = ("alibi_slopes", "sinks")


def call_of(feature):
    """Returns a function of inputs and biases, and those; slopes and sinks are constants."""
    learned = {name: x for name, x in feature.learned().items() if name not in CONSTANT}
    constants = {name: x for name, x in feature.learned().items() if name in CONSTANT}
    inputs = [x.requires_grad_() for x in (*feature.inputs(), *learned.values())]

    def function(q, k, v, *rest):
        options = feature.options | constants | dict(zip(learned, rest, strict=True))
        out, lse = subquad.attention(q, k, v, return_lse=True, **options)
        # A row that sees no key has no finite one.
        return out, torch.where(lse.isfinite(), lse, 0.0)

    return function, inputs


def refused(feature):
    """Returns which option has no higher derivatives, if there is one."""
    return next((name for name in REFUSED if feature.options.get(name)), None)


def test_second_derivatives(feature):
    function, inputs = call_of(feature)
    name = refused(feature)
    if name is None:
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True)
    else:
        with pytest.raises(NotImplementedError, match=f"{name} with higher derivatives"):
            gradgradcheck(function, inputs)


def test_forward_mode(feature):
    function, inputs = call_of(feature)
    name = refused(feature)
    if name is None:
        assert gradcheck(function, inputs, check_forward_ad=True)
    else:
        q, *rest = (x.detach() for x in inputs)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name} with higher"):
            function(forward_ad.make_dual(q, q.clone()), *rest)


@pytest.fixture
def qkv():
    """Queries, keys and values."""
    return FEATURES["plain"].inputs()


def loss(q, k, v):
    return subquad.attention(q, k, v, scale=0.5).sin().sum()


def plain_loss(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return ((0.5 * q @ k.mT).softmax(-1) @ v).sin().sum()


@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
        lambda f: lambda x: jvp(grad(f), (x,), (x.cos(),))[1],
        lambda f: grad(lambda x: grad(f)(x).sin().sum()),
        lambda f: lambda x: vmap(lambda t: jvp(f, (x,), (t,))[1])(torch.stack([x, x.exp()])),
    ],
    ids=["hessian", "reverse over reverse", "jvp", "forward over reverse", "grad of grad", "vmap of jvp"],
)
@pytest.mark.parametrize("index", range(3), ids=list("qkv"))
def test_transforms(transform, index, qkv):
    def of(function):
        return transform(lambda x: function(*qkv[:index], x, *qkv[index + 1 :]))(qkv[index])

    torch.testing.assert_close(of(loss), of(plain_loss), rtol=1e-12, atol=1e-12)


def test_a_penalty_on_gradients_trains(qkv):
    leaves = [x.requires_grad_() for x in qkv]
    found = []
    for function in (loss, plain_loss):
        gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_opcheck(feature):
    if refused(feature) is not None:
        return
    inputs, options = feature.inputs(), feature.lowered()
    out, lse = library.call(ATTENTION, inputs, options)
    biases = [
        bias if bias is not None and bias.is_floating_point() else None
        for bias in (options["bias"], options["relative_bias"])
    ]
    directions = (*inputs, *biases)
    opcheck(library.overload(ATTENTION_JVP), carried(ATTENTION_JVP, (*inputs, *directions), options))
    wrt = ["d_out", "d_lse", "q", "k", "v"]
    wrt += [name for name, one in zip(("bias", "relative_bias"), biases, strict=True) if one is not None]
    for gradients in ((out.cos(), None), (None, lse.clone()), (out, lse)):
        names = [
            name for name, one in zip(wrt, (*gradients, *inputs, *biases), strict=False) if one is not None
        ]
        tensors = (*gradients, out, lse, *inputs, *directions)
        arguments = carried(ATTENTION_DOUBLE_BACKWARD, tensors, options | {"wrt": names})
        opcheck(library.overload(ATTENTION_DOUBLE_BACKWARD), arguments)


def test_the_custom_operator_has_second_derivatives(qkv, plain_options):
    leaves = [x.requires_grad_() for x in qkv]
    found = []
    for out in (library.call(ATTENTION, leaves, plain_options)[0], subquad.attention(*leaves)):
        gradients = torch.autograd.grad(out.sin().sum(), leaves[:2], create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("derivative", "message"),
    [
        (
            lambda f, x: grad(lambda x: jvp(f, (x,), (x,))[1])(x),
            "attention_jvp: derivatives of forward-mode derivatives",
        ),
        (
            lambda f, x: grad(lambda x: grad(lambda x: grad(f)(x).sin().sum())(x).sin().sum())(x),
            "attention_double_backward: third derivatives",
        ),
    ],
)
def test_what_comes_after_is_refused(derivative, message, qkv):
    with pytest.raises(NotImplementedError, match=f"subquad::{message} are not implemented"):
        derivative(lambda q: loss(q, *qkv[1:]), qkv[0])


def test_third_derivatives_are_refused_by_eager_calls(qkv):
    q = qkv[0].requires_grad_()
    (first,) = torch.autograd.grad(loss(*qkv), q, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_double_backward: third derivatives"):
        second.sin().sum().backward()


@pytest.mark.parametrize(("name", "shape"), [("sinks", (4,)), ("alibi_slopes", (4,))])
def test_slopes_and_sinks_are_refused(name, shape, qkv):
    q, k, v = qkv
    learned = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=f"forward-mode derivatives of {name} are not implemented"):
        jvp(lambda x: subquad.attention(q, k, v, **{name: x}), (learned,), (learned,))
    learned.requires_grad_()
    loss = subquad.attention(q.requires_grad_(), k, v, **{name: learned}).sin().sum()
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    message = f"subquad::attention_backward: the gradient of {name} is not implemented"
    with pytest.raises(NotImplementedError, match=message):
        first.sum().backward()


def test_halves_are_refused(qkv):
    q, k, v = (x.half() for x in qkv)
    with pytest.raises(NotImplementedError, match="float16 with higher derivatives"):
        jvp(lambda q: subquad.attention(q, k, v), (q,), (q,))
