"""Which modules use the interface, told by the names in their code."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from subquad.hf.interface import Seam, asks_for_sdpa, bypassing_modules, find_seam


def vision_eager_attention_forward(module, query, key, value, attention_mask, **kwargs):
    return None


class Asks(torch.nn.Module):
    """Attention with an eager function of another name."""

    def forward(self, query):
        functions = ALL_ATTENTION_FUNCTIONS
        function = functions.get_interface(self.config._attn_implementation, vision_eager_attention_forward)
        return function(self, query, query, query, None)


class Inherits(modeling_llama.LlamaAttention):
    """Its file has no eager function."""


class AsksOnce(torch.nn.Module):
    """Keeps what it got when it was built."""

    def __init__(self):
        super().__init__()
        self.function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)

    def forward(self, query):
        return self.function(self, query, query, query, None)


class OwnAttention(torch.nn.Module):
    """Attention without the interface."""

    def forward(self, query):
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)


def _make(cls):
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    return module


@pytest.mark.parametrize(
    ("cls", "eager"),
    [
        (Asks, vision_eager_attention_forward),
        (Inherits, modeling_llama.eager_attention_forward),
        (modeling_llama.LlamaAttention, modeling_llama.eager_attention_forward),
        (modeling_gpt_oss.GptOssAttention, modeling_gpt_oss.eager_attention_forward),
    ],
)
def test_seam(cls, eager):
    seam = find_seam(_make(cls))
    assert seam.eager is eager
    assert seam.functions is ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("cls", [AsksOnce, OwnAttention, torch.nn.Linear, modeling_llama.LlamaForCausalLM])
def test_no_seam(cls):
    assert find_seam(_make(cls)) is None


def _reads_something_else(module, query, key, value, attention_mask, **kwargs):
    weights = torch.matmul(query, key.transpose(2, 3)) * module.temperature
    return torch.matmul(weights, value), weights


@pytest.mark.parametrize(
    ("function", "is_ordinary"),
    [
        (modeling_llama.eager_attention_forward, True),
        (modeling_bert.eager_attention_forward, True),
        (modeling_gpt_oss.eager_attention_forward, False),
        (_reads_something_else, False),
        (None, False),
    ],
)
def test_ordinary(function, is_ordinary):
    assert Seam(ALL_ATTENTION_FUNCTIONS, function).is_ordinary == is_ordinary


def test_asks_for_sdpa():
    class AsksForOneOf(torch.nn.Module):
        def forward(self):
            return self.config._attn_implementation in ("eager", "sdpa")

    assert asks_for_sdpa(AsksForOneOf())
    assert not asks_for_sdpa(_make(modeling_llama.LlamaForCausalLM))
    assert not asks_for_sdpa(_make(Asks))


def test_bypassing():
    inner = OwnAttention()
    outer = OwnAttention()
    outer.inner = inner
    mixed = OwnAttention()
    mixed.inner = _make(Asks)
    assert bypassing_modules(torch.nn.ModuleList([outer, mixed, torch.nn.Linear(1, 1)])) == [inner]
