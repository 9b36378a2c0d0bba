"""Generation with a patched model gives the tokens and logits of the unpatched one."""

from __future__ import annotations

import pytest
import torch
import transformers

import subquad.hf

MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
NEW_TOKENS = 12


def _generate(model, batch, **options):
    return model.generate(
        batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "gemma2", "gpt-oss"])
def test_generate(name, mode, *, decoder, make_batch, assert_same):
    model = decoder(name)
    lookup = "lookup" in mode
    batch = make_batch(12, left=0 if lookup else 5, size=1 if lookup else 2)
    expected = _generate(model, batch, **MODES[mode])
    with subquad.hf.patch(model) as handle:
        actual = _generate(model, batch, **MODES[mode])
        report = handle.report()
    assert torch.equal(actual.sequences, expected.sequences)
    assert report.computed > 0
    assert not report.delegated
    if "beams" not in mode:
        assert_same(torch.stack(actual.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("deepseek-v3.2", "indices"), ("minimax-m3", "block_indices")],
)
def test_generate_delegated(name, reason, mode, *, decoder, make_batch, assert_same):
    model = decoder(name)
    batch = make_batch(12)
    expected = _generate(model, batch, **MODES[mode])
    with subquad.hf.patch(model) as handle:
        actual = _generate(model, batch, **MODES[mode])
        reasons = {one.reason for one in handle.report().delegated}
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits))
    assert reasons == {reason}


def test_assisted(decoder, make_batch):
    model, assistant = decoder("llama"), decoder("llama", num_hidden_layers=1)
    batch = make_batch(12, size=1)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": batch.mask}
    expected = model.generate(batch.ids, assistant_model=assistant, **options)
    with subquad.hf.patch(model), subquad.hf.patch(assistant) as second:
        actual = model.generate(batch.ids, assistant_model=assistant, **options)
        assert second.report().computed > 0
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "deepseek-v3"])
def test_chunked_prefill(name, cache, left, *, decoder, make_batch, extend, assert_same, calls):
    model = decoder(name)
    batch = make_batch(20, left=left)

    def run():
        if cache == "dynamic":
            past = transformers.DynamicCache(config=model.config)
        else:
            past = transformers.StaticCache(config=model.config, max_cache_len=32)
        logits = []
        for start, end in ((0, 9), (9, 19), (19, 20)):
            mask = batch.mask[:, :end] if left else None
            logits.append(extend(model, past, batch.ids[:, start:end], mask))
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        expected = run()
        with subquad.hf.patch(model) as handle:
            actual = run()
            assert not handle.report().delegated
    assert_same(actual, expected, batch.mask)
    if name in ("llama", "deepseek-v3"):
        # No place of the static cache that is still empty is read, and no mask is larger than the padding.
        assert calls.key_lengths == [9, 9, 19, 19, 20, 20]
        assert all(bias is None or bias.shape[-2] == 1 for bias in calls.biases)
        assert calls.causal[2:4] == [True, True]


def test_long_prompt_with_window(decoder, make_batch, extend, assert_same):
    # Once the sliding cache is full, its keys no longer start at the first token.
    model = decoder("mistral-window")
    batch = make_batch(30, left=3)

    def run():
        past = transformers.DynamicCache(config=model.config)
        pieces = ((0, 13), (13, 17), (17, 18), (18, 19), (19, 30))
        logits = [extend(model, past, batch.ids[:, start:end], batch.mask[:, :end]) for start, end in pieces]
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        expected = run()
        with subquad.hf.patch(model):
            assert_same(run(), expected, batch.mask)
