"""A trained model writes the same with a patch. Takes minutes: `pytest -m slow`."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import DynamicCache

import subquad.hf
from subquad.cli.demo import text, weights
from subquad.cli.errors import UserError

PROMPT = 6000
NEW_TOKENS = 256

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def directory():
    for package in ("gguf", "platformdirs", "accelerate"):
        pytest.importorskip(package)
    try:
        return weights.prepare(weights.locate())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def prompt(directory):
    try:
        return torch.tensor([text.prompt_ids(weights.load_tokenizer(directory), PROMPT)])
    except UserError as error:
        pytest.skip(str(error))


def _generate(model, prompt):
    # Tokens that end the text do not end it here.
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = getattr(result, "cache", None) or result.past_key_values
    return result.sequences[0, PROMPT:].tolist(), type(cache)


def test_greedy(directory, prompt):
    torch.set_num_threads(os.cpu_count() or 1)
    model = weights.load_model(directory, "float32")
    expected, kind = _generate(model, prompt)
    assert (len(expected), kind) == (NEW_TOKENS, DynamicCache)
    with subquad.hf.patch(model) as handle:
        actual, kind = _generate(model, prompt)
        report = handle.report()
    assert kind is subquad.hf.GrowingCache
    assert report.computed == NEW_TOKENS * model.config.num_hidden_layers
    assert not report.delegated
    assert actual == expected
