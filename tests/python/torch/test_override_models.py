"""Real modules under `override_sdpa` give what they give without."""

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import nn

from subquad.torch import override_sdpa


def compare(model, *inputs, calls):
    """Runs a model with and without subquad; expects as many calls."""
    model = model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        with override_sdpa() as override:
            out = model(*inputs)
    report = override.report()
    assert (report.computed, report.delegated) == (calls, {})
    torch.testing.assert_close(out, expected)
    # Bitwise equality would mean that PyTorch computed both.
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_vision_transformers_of_timm(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=56)
    compare(model, torch.randn(2, 3, 56, 56), calls=len(model.blocks))


class Attention(nn.Module):
    """Attention as diffusers has it: self or cross, heads split by views, a mask for the text."""

    def __init__(self, width, heads, context=None):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(context or width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        batch, _, width = x.shape
        query, key, value = (
            part.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        return self.out(out.transpose(1, 2).reshape(batch, -1, width).to(query.dtype))


class Block(nn.Module):
    """A block of a diffusion model."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(3))
        self.self_attention, self.cross_attention = Attention(64, 4), Attention(64, 8, context=48)
        self.feed_forward = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x, text, mask):
        x = x + self.self_attention(self.norms[0](x))
        x = x + self.cross_attention(self.norms[1](x), text, mask)
        return x + self.feed_forward(self.norms[2](x))


class Denoiser(nn.Module):
    """Blocks over the pixels of an image, with a text."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image, text, mask):
        x = self.enter(image)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, text, mask)
        return self.leave(x.transpose(1, 2).reshape(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", ["none", "bool", "float"])
def test_modules_like_those_of_diffusers(of, dtype):
    torch.manual_seed(0)
    length = torch.tensor([11, 4])
    visible = (torch.arange(11) < length[:, None])[:, None, None]
    mask = {
        "none": None,
        "bool": visible,
        "float": torch.zeros(visible.shape).masked_fill(~visible, -10_000.0),
    }[of]
    mask = mask.to(dtype) if of == "float" else mask
    inputs = torch.randn(2, 4, 12, 10, dtype=dtype), torch.randn(2, 11, 48, dtype=dtype), mask
    compare(Denoiser().to(dtype), *inputs, calls=4)


def test_multi_head_attention_in_train_mode():
    # In eval mode without gradients it takes a fused path that does not call the function.
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        expected, _ = module(x, x, x, need_weights=False)
        with override_sdpa() as override:
            out, _ = module(x, x, x, need_weights=False)
    assert override.report().computed == 1
    torch.testing.assert_close(out, expected)


def test_the_fused_path_is_not_reached():
    # As documented; if this changes, so has PyTorch.
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    with torch.no_grad(), override_sdpa() as override:
        layer(torch.randn(2, 9, 32))
    assert override.report().computed == 0


def test_training():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(images).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with override_sdpa() as override:
        model(images).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert override.report().computed == 2
    assert override.report().delegated == {}
