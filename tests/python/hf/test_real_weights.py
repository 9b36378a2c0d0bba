"""A trained model writes the same with a patch. Takes minutes: `pytest -m slow`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from transformers import DynamicCache

import subquad.hf
from subquad.cli.demo import text, weights
from subquad.cli.demo.models import MODELS
from subquad.cli.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Case(NamedTuple):
    """A model, its length of prompt, how many tokens it writes, and the attention that says which."""

    model: str
    prompt: int
    new_tokens: int
    reference: str


CASES = [
    Case("smollm2", 6000, 256, "sdpa"),
    # Most of its layers see the last 512 tokens.
    Case("gemma", 4096, 64, "eager"),
]


@pytest.fixture(params=CASES, ids=lambda case: case.model)
def case(request) -> Case:
    return request.param


@pytest.fixture
def directory(case):
    for package in ("gguf", "platformdirs", "accelerate"):
        pytest.importorskip(package)
    try:
        return weights.prepare(weights.locate(MODELS[case.model]))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def prompt(case, directory):
    try:
        return torch.tensor([text.prompt_ids(weights.load_tokenizer(directory), case.prompt)])
    except UserError as error:
        pytest.skip(str(error))


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[list[int], type]:
    # Tokens that end the text do not end it here.
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = getattr(result, "cache", None) or result.past_key_values
    return result.sequences[0, prompt.shape[1] :].tolist(), type(cache)


def test_greedy(case, directory, prompt):
    torch.set_num_threads(os.cpu_count() or 1)
    model = weights.load_model(directory, "float32")
    implementation = model.config._attn_implementation
    model.set_attn_implementation(case.reference)
    expected, kind = _generate(model, prompt, case.new_tokens)
    assert (len(expected), kind) == (case.new_tokens, DynamicCache)
    model.set_attn_implementation(implementation)
    with subquad.hf.patch(model) as handle:
        actual, kind = _generate(model, prompt, case.new_tokens)
        report = handle.report()
    assert kind is subquad.hf.GrowingCache
    assert report.computed == case.new_tokens * model.config.num_hidden_layers
    assert not report.delegated
    assert actual == expected
