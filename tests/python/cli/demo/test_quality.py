"""Logits and perplexity of two runs, against the direct computation on whole logits."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from subquad.cli.demo import quality  # noqa: E402

VOCABULARY = 97


# Around the size of a block, where its last row or none is left without a token to predict.
@pytest.mark.parametrize("length", [2, 40, 255, 256, 257, 258, 513])
def test_against_whole_logits(model, monkeypatch, length):
    monkeypatch.setattr(quality, "_BLOCK_LOGITS", 256 * VOCABULARY + 1)
    ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        logits = model(input_ids=ids).logits[0].double()
        loss = model(input_ids=ids, labels=ids).loss
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    other = (hidden + noise).double() @ model.lm_head.weight.detach().double().T
    found = quality.compare(model, ids, hidden, hidden + noise)

    assert found.perplexity_baseline == pytest.approx(math.exp(loss.item()), rel=1e-4)
    expected = torch.nn.functional.cross_entropy(other[:-1], ids[0, 1:])
    assert found.perplexity_candidate == pytest.approx(expected.exp().item(), rel=1e-4)
    assert found.positions == length
    assert found.logit_difference == pytest.approx((logits - other).abs().max().item(), rel=1e-4)
    assert found.logit_difference_last == pytest.approx((logits - other)[-1].abs().max().item(), rel=1e-4)


# A vocabulary so large that one position would be too many, or a block none, still gets a comparison.
@pytest.mark.parametrize(("most", "block", "positions"), [(13, 5, 13), (39, 1, 39), (0.5, 0.5, 2)])
def test_only_the_last_positions_of_a_large_vocabulary(model, prompt, monkeypatch, most, block, positions):
    monkeypatch.setattr(quality, "_MOST_LOGITS", int(most * VOCABULARY))
    monkeypatch.setattr(quality, "_BLOCK_LOGITS", int(block * VOCABULARY))
    hidden = model.base_model(input_ids=prompt).last_hidden_state[0].detach()
    other = hidden.clone()
    other[:-positions] = math.nan  # not looked at
    other[-positions] += 1.0
    found = quality.compare(model, prompt, hidden, other)
    logits = (hidden @ model.lm_head.weight.detach().T)[-positions:]
    expected = torch.nn.functional.cross_entropy(logits[:-1], prompt[0, 1 - positions :])
    assert found.positions == positions
    assert found.perplexity_baseline == pytest.approx(expected.exp().item(), rel=1e-4)
    changed = model.lm_head.weight.detach().sum(1).abs().max().item()
    assert found.logit_difference == pytest.approx(changed, rel=1e-4)
    assert found.logit_difference_last == 0.0


def test_the_same_states(model, prompt):
    hidden = torch.ones(prompt.shape[1], 16)
    found = quality.compare(model, prompt, hidden, hidden.clone())
    assert found.logit_difference == found.logit_difference_last == 0.0
    assert found.perplexity_baseline == found.perplexity_candidate


def test_logits_are_float32_in_bfloat16_too(make_model, prompt):
    model = make_model("bfloat16")
    hidden = torch.ones(prompt.shape[1], 16, dtype=torch.bfloat16)
    other = hidden.clone()
    other[-1, 0] += 2**-7  # one unit of rounding; in a bfloat16 logit it would vanish or double
    found = quality.compare(model, prompt, hidden, other)
    largest = model.lm_head.weight[:, 0].abs().max().item()
    assert found.logit_difference_last == pytest.approx(largest * 2**-7, rel=1e-3)


def test_a_broken_result_is_shown(model, prompt):
    hidden = torch.ones(prompt.shape[1], 16)
    broken = hidden.clone()
    broken[3] = math.nan
    found = quality.compare(model, prompt, hidden, broken)
    assert math.isnan(found.logit_difference)
    assert math.isnan(found.perplexity_candidate) or math.isinf(found.perplexity_candidate)
    huge = quality.compare(model, prompt, hidden, hidden * 1e6)
    assert math.isinf(huge.perplexity_candidate)
