"""Models generate with `GrowingCache` what they generate with `DynamicCache`."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from subquad.hf.growing_cache import GrowingCache, use_in_generate

from .comparison import assert_same_cache, generate

MODELS = ["llama", "qwen3", "mistral-window", "gemma3", "phi3"]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "beams of samples": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.fixture
def model(request, decoder):
    return decoder(request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_generate(model, mode, make_batch):
    # The mask of a chunk covers the chunks so far only with transformers' own slicing of it.
    batch = make_batch(12, left=0 if "chunk" in mode else 5)
    expected, cache_expected = generate(model, batch, **MODES[mode])
    with use_in_generate(model) as handle:
        assert handle.reason is None
        actual, cache = generate(model, batch, **MODES[mode])
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same_cache(cache, cache_expected)
    if "num_beams" not in MODES[mode]:
        layer = cache.layers[-1]
        assert layer.capacity >= layer.keys.shape[2]


@pytest.mark.parametrize("mode", ["assistant", "assistant samples", "prompt lookup"])
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_assisted(model, mode, decoder, make_batch):
    batch = make_batch(6, size=1)
    batch = type(batch)(batch.ids.repeat(1, 3), batch.mask.repeat(1, 3))
    options = {"prompt_lookup_num_tokens": 3}
    assistant = decoder("llama", num_hidden_layers=1)
    if mode != "prompt lookup":
        options = {"assistant_model": assistant, "do_sample": "samples" in mode}
    expected, cache_expected = generate(model, batch, **options)
    with use_in_generate(model), use_in_generate(assistant):
        actual, cache = generate(model, batch, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same_cache(cache, cache_expected)


def test_encoder_decoder(make_batch):
    config = transformers.T5Config(
        vocab_size=97,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = make_batch(9, left=2)
    expected, _ = generate(model, batch, num_beams=2)
    with use_in_generate(model):
        actual, cache = generate(model, batch, num_beams=2)
    assert torch.equal(actual.sequences, expected.sequences)
    assert type(cache.self_attention_cache) is GrowingCache
    assert type(cache.cross_attention_cache) is DynamicCache


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_forward_in_pieces(model, make_batch, extend):
    ids = make_batch(40).ids
    caches = GrowingCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in ids.split([13, 20, 1, 1, 1, 4], dim=1):
            actual, expected = (extend(model, cache, piece, None) for cache in caches)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert_same_cache(*caches)


def _held_bytes(cache):
    return sum(
        states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values)
    )


@torch.no_grad()
@pytest.mark.parametrize("pieces", [None, 64, 500])
def test_memory_after_a_prompt(pieces, decoder, make_batch):
    model = decoder("llama", max_position_embeddings=2048)
    batch = make_batch(2000, size=1)
    options = {"max_new_tokens": 1, "output_logits": False, "prefill_chunk_size": pieces}
    _, expected = generate(model, batch, **options)
    with use_in_generate(model):
        _, actual = generate(model, batch, **options)
    assert_same_cache(actual, expected)
    assert _held_bytes(actual) <= 1.13 * _held_bytes(expected)
