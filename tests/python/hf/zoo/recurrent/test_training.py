"""Gradients of patched models with recurrent layers are those of unpatched ones."""

from __future__ import annotations

import pytest
import torch

import subquad.hf

from .models import LEFT, build, distance, whole

KINDS = (
    *("qwen3_5_text", "olmo_hybrid", "kimi_linear", "mamba2", "falcon_h1", "zamba2"),
    *("mamba", "zamba", "lfm2", "minimax", "rwkv", "recurrent_gemma"),
)


def _gradients(model):
    model.train()
    model.zero_grad()
    # Logits of random weights are about 1.
    whole(model, LEFT).square().mean().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, checkpointing):
    model = build(kind)
    if checkpointing:
        # Transformers renamed it.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))()
    expected = _gradients(model)
    with subquad.hf.patch(model) as handle:
        actual = _gradients(model)
        report = handle.report()
    assert actual.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, gradient in expected.items():
        difference = float((actual[name] - gradient).abs().max())
        # Some gradients are zero but for rounding.
        assert difference < 1e-4 * float(gradient.abs().max()) + 1e-6 * largest, name
    assert sum(report.computed_recurrent.values()) > 0
    assert report.delegated == ()


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "mamba", "lfm2"])
def test_single_tokens_in_grad_mode(kind):
    model = build(kind)
    ids = torch.arange(5, 25)[None]

    def decode():
        first = model(ids, use_cache=True)
        name = next(
            name for name in ("cache", "past_key_values", "cache_params") if first.get(name) is not None
        )
        return model(ids[:, :1], use_cache=True, **{name: first[name]}).logits

    expected = decode()
    with subquad.hf.patch(model) as handle:
        assert distance(decode().detach(), expected.detach()) < 1e-5
        assert all(one.reason == "gradients of a step" for one in handle.report().delegated)
