"""Training of flash-linear-attention's layers on the CPU: gradients, against differences of the float64 layers with oracles."""

import pytest
import torch

from . import oracles
from .cases import CASES, build, called, error, outputs

# RWKV-7's layer says that it may be wrong.
pytestmark = pytest.mark.filterwarnings("ignore:According to Bo:UserWarning")

STEP = 1e-6
# Of differences from norms of gradients. Central differences of sums of float64 numbers have 1e-7 themselves.
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-6}


def inputs(case, dtype, padding):
    """The layer, its tensors by name, and the padding of one row."""
    layer, x = build(case)
    layer, x = layer.to(dtype), x.to(dtype)
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    mask[1, :padding] = 0
    return layer, {"x": x, **dict(layer.named_parameters())}, {"attention_mask": mask} if padding else {}


def directions(tensors):
    """For each tensor random signs, and weights of outputs."""
    generator = torch.Generator().manual_seed(1)
    signs = {
        name: torch.randint(0, 2, tensor.shape, generator=generator).double() * 2 - 1
        for name, tensor in tensors.items()
    }
    return signs, torch.randn(tensors["x"].shape, generator=generator, dtype=torch.float64)


def loss(out, weights, mask):
    """A sum of outputs that are not of padding."""
    weights = weights if mask is None else weights * mask[..., None]
    return (out * weights.to(out.dtype)).sum()


@torch.no_grad()
def slopes(case, padding):
    """How the loss rises with each tensor along its direction."""
    with oracles.in_place():
        layer, tensors, options = inputs(case, torch.float64, padding)
        signs, weights = directions(tensors)

        def value():
            out = outputs(layer, tensors["x"], case, **options)
            return float(loss(out, weights, options.get("attention_mask")))

        found = {}
        for name, tensor in tensors.items():
            start = tensor.clone()
            tensor.copy_(start + STEP * signs[name])
            above = value()
            tensor.copy_(start - STEP * signs[name])
            found[name] = (above - value()) / (2 * STEP)
            tensor.copy_(start)
        return found


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_slopes_of_the_oracles(name, padding, request):
    case = CASES[name]
    wanted = slopes(case, padding)
    request.getfixturevalue("installed")
    for dtype, limit in LIMITS.items():
        layer, tensors, options = inputs(case, dtype, padding)
        signs, weights = directions(tensors)
        tensors["x"].requires_grad_()
        out = called(layer.train(), tensors["x"], case, **options)
        loss(out, weights, options.get("attention_mask")).backward()
        for key, slope in wanted.items():
            grad = tensors[key].grad
            if grad is None:
                # Of parameters without influence on these outputs.
                assert abs(slope) < limit, key
                continue
            assert grad.dtype == dtype
            along = float((grad.double() * signs[key]).sum())
            assert abs(along - slope) <= limit * float(grad.norm()), key


@pytest.mark.parametrize("name", CASES)
def test_training_under_autocast(name, installed):
    case, found = CASES[name], []
    for enabled in (True, False):
        layer, tensors, _ = inputs(case, torch.float32, 0)
        _, weights = directions(tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = called(layer.train(), tensors["x"], case)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        loss(out, weights, None).backward()
        grads = [one.grad for one in layer.parameters() if one.grad is not None]
        assert all(grad.dtype == torch.float32 for grad in grads)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    # Every linear map of the layer rounds in both directions.
    assert error(*found) < 0.05
