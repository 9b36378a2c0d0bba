"""The example that times a hybrid model, on a tiny one."""

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def example(load_example):
    """The example as a module."""
    return load_example("hybrid_prefill")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_both_ways_agree(example):
    model = example.build(torch.float32, hidden=64)
    runs = example.compare(model, torch.arange(40)[None] % 7, rounds=2, new_tokens=3)
    for run in runs.values():
        assert len(run.prompts) == 2
        assert len(run.tokens) == 6
    torch.testing.assert_close(runs["subquad"].logits, runs["transformers"].logits, rtol=1e-4, atol=1e-4)
