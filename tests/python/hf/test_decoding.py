"""Every way of decoding gives a patched model the tokens of the unpatched one, from a cache that grows in place."""

from __future__ import annotations

import copy
import inspect
import warnings
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache

import subquad.hf
from subquad.hf import GrowingCache

# Gemma 3 has a layer with a window and one without, Phi 3 here windows only. Prompts exceed the window of 8.
MODELS = ["llama", "qwen3", "gemma3", "phi3-window"]
WINDOW = 8
NEW_TOKENS = 24
SEAM = "_prepare_cache_for_generation"
CANDIDATES = 3


@pytest.fixture
def used(monkeypatch):
    """Counts the calls of methods of growing caches that changed something."""
    counts = dict.fromkeys(("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"), 0)

    def count(name):
        method = getattr(GrowingCache, name)

        def counting(self, argument):
            if name == "reorder_cache":
                counts[name] += argument.tolist() != list(range(argument.shape[0]))
            else:
                counts[name] += name != "crop" or argument < 0
            return method(self, argument)

        monkeypatch.setattr(GrowingCache, name, counting)

    for name in counts:
        count(name)
    return counts


def _generate(model, batch, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(
        batch.ids,
        attention_mask=batch.mask,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **options,
    )


def _cache_of(result):
    return getattr(result, "cache", None) or result.past_key_values


def _compare(model, batch, assert_same, **options):
    """Generates without and with the patch; returns both results and the calls of the patched model."""
    expected = _generate(model, batch, **options)
    assert type(_cache_of(expected)) is DynamicCache
    with subquad.hf.patch(model) as handle:
        actual = _generate(model, batch, **options)
        report = handle.report()
    assert type(_cache_of(actual)) is GrowingCache
    assert (report.cache, report.delegated) == (None, ())
    assert report.computed > 0
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(_cache_of(actual), _cache_of(expected), strict=True):
        for name in range(2):
            torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-4)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits))
    # Models that repeat themselves would do so with any attention.
    assert actual.sequences[:, batch.ids.shape[1] :].unique().numel() >= NEW_TOKENS // 3
    return actual, expected, report.computed // model.config.num_hidden_layers


def _cache_argument(model):
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@pytest.fixture(params=MODELS)
def model(request, decoder):
    return decoder(request.param)


@pytest.mark.parametrize("left", [0, 5])
def test_greedy(left, *, model, make_batch, assert_same):
    _compare(model, make_batch(20, left=left, size=3), assert_same)


@pytest.mark.parametrize("left", [0, 5])
def test_sampling(left, *, model, make_batch, assert_same):
    actual, _, _ = _compare(model, make_batch(20, left=left), assert_same, do_sample=True, top_k=0)
    assert not torch.equal(actual.sequences, _generate(model, make_batch(20, left=left)).sequences)


@pytest.mark.parametrize("left", [0, 5])
def test_beams(left, *, model, make_batch, assert_same, used):
    batch = make_batch(20, left=left)
    actual, expected, _ = _compare(
        model, batch, assert_same, num_beams=4, num_return_sequences=3, output_scores=True
    )
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual.beam_indices, expected.beam_indices)
    assert used["reorder_cache"] > 0


@pytest.mark.parametrize("assistant", ["itself", "another"])
def test_assisted(assistant, *, model, decoder, make_batch, assert_same, used):
    # One of them guesses right always, the other one hardly ever.
    second = copy.deepcopy(model) if assistant == "itself" else decoder("llama", num_hidden_layers=1)
    with subquad.hf.patch(second) as handle:
        _, _, calls = _compare(model, make_batch(20, size=1), assert_same, assistant_model=second)
        assert handle.report().computed > 0
    if assistant == "itself":
        assert calls < NEW_TOKENS
    else:
        assert used["crop"] > NEW_TOKENS


def test_assisted_samples(model, decoder, make_batch, assert_same, used):
    second = decoder("llama", num_hidden_layers=1)
    _compare(model, make_batch(20, size=1), assert_same, assistant_model=second, do_sample=True)
    assert used["crop"] > 0


def test_prompt_lookup(model, make_batch, assert_same, used):
    batch = make_batch(6, size=1)
    # The prompt repeats itself, so that there is something to look up.
    own = _generate(model, batch).sequences
    batch = type(batch)(own.repeat(1, 2), torch.ones_like(own).repeat(1, 2))
    _compare(model, batch, assert_same, prompt_lookup_num_tokens=3)
    assert used["crop"] > 0


@pytest.mark.parametrize("size", [5, 16])
def test_chunked_prefill(size, *, model, make_batch, assert_same):
    _compare(model, make_batch(21), assert_same, prefill_chunk_size=size)


def _scores(hidden, candidates, mask, probabilities):
    """Contrastive search: probable, and unlike everything before. `[B, candidates]`."""
    likeness = torch.nn.functional.cosine_similarity(hidden[:, None], candidates[:, :, None], dim=-1)
    likeness = likeness.masked_fill(mask[:, None] == 0, -2).amax(-1)
    return 0.4 * probabilities - 0.6 * likeness


def _contrastive(model, input_ids, *, at_once, **kwargs):
    name = _cache_argument(model)
    cache = kwargs[name]
    size = input_ids.shape[0]
    if not at_once:
        cache.activate_past_recording()

    def run(ids, mask):
        output = model(ids, attention_mask=mask, output_hidden_states=True, **{name: cache})
        return output.logits[:, -1], output.hidden_states[-1]

    # Masks that hide nothing are not passed on.
    ids, mask = input_ids, kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    logits, hidden = run(ids, mask)
    for _ in range(NEW_TOKENS):
        probabilities, tokens = logits.softmax(-1).topk(CANDIDATES)
        longer = torch.cat([mask, mask.new_ones(size, 1)], dim=1)
        if at_once:
            cache.batch_repeat_interleave(CANDIDATES)
            repeated = longer.repeat_interleave(CANDIDATES, dim=0)
            logits, states = run(tokens.reshape(-1, 1), repeated)
            states = states.view(size, CANDIDATES, -1)
            best = _scores(hidden, states, mask, probabilities).argmax(-1)
            rows = torch.arange(size) * CANDIDATES + best
            cache.batch_select_indices(rows)
            logits = logits[rows]
        else:
            states = []
            for candidate in tokens.split(1, dim=1):
                states.append(run(candidate, longer)[1])
                cache.crop(-1)
            states = torch.cat(states, dim=1)
            best = _scores(hidden, states, mask, probabilities).argmax(-1)
            logits, _ = run(tokens.gather(1, best[:, None]), longer)
        hidden = torch.cat([hidden, states[torch.arange(size), best][:, None]], dim=1)
        ids, mask = torch.cat([ids, tokens.gather(1, best[:, None])], dim=1), longer
    return ids, cache


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("left", [0, 5])
def test_contrastive(left, at_once, *, model, make_batch, used):
    # Contrastive search is no longer part of transformers: these are its two variants, as a `custom_generate`.
    if not (at_once or hasattr(DynamicCache, "activate_past_recording")):
        pytest.skip("this transformers has no windows that can be cropped")
    batch = make_batch(20, left=left)

    def run():
        return model.generate(
            batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=NEW_TOKENS,
            custom_generate=_contrastive,
            at_once=at_once,
        )

    expected, cache_expected = run()
    with subquad.hf.patch(model) as handle:
        actual, cache = run()
        assert not handle.report().delegated
    assert (type(cache_expected), type(cache)) == (DynamicCache, GrowingCache)
    assert torch.equal(actual, expected)
    greedy = _generate(model, batch).sequences
    assert not torch.equal(actual, greedy)
    names = ("batch_repeat_interleave", "batch_select_indices") if at_once else ("crop",)
    assert all(used[name] >= NEW_TOKENS for name in names)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("patched", [False, True])
def test_cache_of_the_caller(patched, name, *, model, make_batch):
    if name == "cache" and _cache_argument(model) != name:
        pytest.skip("this transformers has no such argument")
    batch = make_batch(20, left=5)
    expected = _generate(model, batch).sequences
    mine = GrowingCache(config=model.config)
    with subquad.hf.patch(model) if patched else nullcontext():
        with warnings.catch_warnings():
            # Of the old name.
            warnings.simplefilter("ignore", FutureWarning)
            first = _generate(model, batch, max_new_tokens=10, **{name: mine})
        assert _cache_of(first) is mine
        # The text goes on from where it was.
        mask = torch.cat([batch.mask, batch.mask.new_ones(2, 10)], dim=1)
        rest = _generate(
            model,
            type(batch)(first.sequences, mask),
            max_new_tokens=NEW_TOKENS - 10,
            **{_cache_argument(model): mine},
        )
    assert torch.equal(rest.sequences, expected)
    assert mine.get_seq_length() == 20 + NEW_TOKENS - 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"max_new_tokens": 1}])
def test_static_cache(options, *, model, make_batch):
    batch = make_batch(20, left=5)
    options = {"cache_implementation": "static", **options}
    expected = _generate(model, batch, **options)
    with subquad.hf.patch(model):
        actual = _generate(model, batch, **options)
    assert isinstance(_cache_of(actual), StaticCache)
    assert torch.equal(actual.sequences, expected.sequences)


def test_undo(model, make_batch):
    batch = make_batch(20)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    with subquad.hf.patch(model):
        assert type(_cache_of(_generate(model, batch))) is GrowingCache
    assert SEAM not in vars(model)
    assert model.config._attn_implementation == implementation
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())
    assert type(_cache_of(_generate(model, batch))) is DynamicCache


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_shared_keys(name, options, *, decoder, make_batch):
    model = decoder(name, sliding_window=WINDOW)
    batch = make_batch(20, left=5)
    expected = _generate(model, batch, **options)
    with subquad.hf.patch(model) as handle:
        actual = _generate(model, batch, **options)
        report = handle.report()
    assert torch.equal(actual.sequences, expected.sequences)
    assert type(_cache_of(actual)) is DynamicCache
    assert "num_kv_shared_layers" in report.cache
    assert "generate: caches left alone: its layers share keys and values" in str(report)
    # Given on purpose, it does work.
    mine = GrowingCache(config=model.config)
    actual = _generate(model, batch, **options, **{_cache_argument(model): mine})
    assert torch.equal(actual.sequences, expected.sequences)
