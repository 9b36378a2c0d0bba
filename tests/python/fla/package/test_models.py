"""Models on the CPU where flash-linear-attention is installed: its own, and those of transformers, which take its functions."""

import copy
import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GLAConfig, GLAForCausalLM

import subquad

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 50, "intermediate_size": 96}
OWN = {
    "GLA": (GLAForCausalLM, GLAConfig(**SIZES)),
    "gated DeltaNet": (GatedDeltaNetForCausalLM, GatedDeltaNetConfig(**SIZES, head_dim=16)),
}
QWEN3_NEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}


@pytest.mark.parametrize("name", OWN)
def test_models_of_the_package_go_on_with_their_caches(name, installed):
    torch.manual_seed(0)
    kind, config = OWN[name]
    model = kind(config).eval()
    tokens, mask = torch.randint(1, 50, (2, 74)), torch.ones(2, 74, dtype=torch.long)
    mask[1, :9] = 0
    parts, cache = [], None
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        alone = model(tokens[1:, 9:]).logits
        for start, stop in pairwise((0, 70, 71, 72, 73, 74)):
            options = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
            out = model(tokens[:, start:stop], **options)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(whole[1:, 9:], alone, rtol=1e-5, atol=1e-6)
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[0], whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1, 9:], whole[1, 9:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OWN)
def test_models_of_the_package_are_trained(name, installed):
    torch.manual_seed(0)
    kind, config = OWN[name]
    model = kind(copy.deepcopy(config)).train()
    # Whose kernel is flash-linear-attention's.
    model.config.fuse_cross_entropy = False
    tokens, losses = torch.randint(1, 50, (2, 74)), []
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(after < before - 0.2 for before, after in pairwise(losses))


def test_models_of_transformers_take_its_functions(installed, monkeypatch):
    # Imported here: they look for functions when they are imported.
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    config = Qwen3NextConfig(**QWEN3_NEXT)
    prompt = torch.randint(0, 64, (1, 70), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config).eval()
    calls = []
    native = subquad.ops.recurrent._native.recurrent
    counting = SimpleNamespace(recurrent=lambda *arguments: calls.append(1) or native(*arguments))
    monkeypatch.setattr(subquad.ops.recurrent, "_native", counting)

    def run():
        with torch.no_grad():
            out = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
            return out, model(prompt).logits

    tokens, logits = run()
    assert len(calls) == 4
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config).eval()
    other_tokens, other_logits = run()
    assert len(calls) == 4
    assert torch.equal(tokens, other_tokens)
    torch.testing.assert_close(logits, other_logits, rtol=1e-4, atol=1e-5)
