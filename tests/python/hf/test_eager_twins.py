"""Whole models whose masks or sinks differ from token to token, patched, against their eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers

import subquad.hf

NEW_TOKENS = 12
LENGTH = 40
PADDING = (6, 2)
# The last of the vocabulary of tiny models: no text has it.
IMAGE = 96
IMAGE_SIZE = 16
PATCH_SIZE = 4
# More than the window, which cuts what an image sees of itself.
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Where images begin, for each sequence: one in the middle of the text, and two with text between.
IMAGES = ((14,), (3, 22))


def _padded_text():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, IMAGE, (len(PADDING), LENGTH), generator=generator)
    mask = torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def _logits(model, inputs):
    """The logits of all tokens but the padding."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def _generated(model, inputs):
    """The new tokens, and their logits."""
    result = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    return result.sequences[:, LENGTH:], torch.stack(result.logits, dim=1)


@pytest.fixture
def image_model(decoder):
    """Gemma 3, whose images see themselves in both directions."""
    if not hasattr(transformers, "Gemma3ForConditionalGeneration"):
        pytest.skip("this transformers has no Gemma 3")
    config = transformers.Gemma3Config(
        text_config=decoder("gemma3").config.to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    # It begins with zeros, by which all images would be the same.
    projector = model.model.multi_modal_projector
    torch.nn.init.normal_(projector.mm_input_projection_weight, std=0.25)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def image_inputs():
    inputs = _padded_text()
    is_image = torch.zeros_like(inputs["input_ids"])
    for row, starts in enumerate(IMAGES):
        for start in starts:
            is_image[row, PADDING[row] + start : PADDING[row] + start + IMAGE_TOKENS] = 1
    generator = torch.Generator().manual_seed(2)
    count = sum(map(len, IMAGES))
    return {
        **inputs,
        "input_ids": inputs["input_ids"].masked_fill(is_image.bool(), IMAGE),
        "token_type_ids": is_image,
        "pixel_values": torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    }


@pytest.fixture
def sink_model(decoder):
    """Inkling 2, which computes a sink from each token."""
    model = decoder("inkling2")
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def assert_twins(assert_same):
    """Compares the logits, and the greedy tokens with theirs, of a model with eager attention and patched from `original`."""

    def check(model, inputs, original):
        expected = _logits(model, inputs)
        tokens, logits = _generated(model, inputs)
        model.set_attn_implementation(original)
        with subquad.hf.patch(model) as handle:
            assert_same(_logits(model, inputs), expected)
            computed = handle.report().computed
            actual_tokens, actual_logits = _generated(model, inputs)
            assert handle.report().delegated == ()
        assert torch.equal(actual_tokens, tokens)
        assert_same(actual_logits, logits)
        return computed

    return check


@torch.no_grad()
@pytest.mark.parametrize("original", ["eager", "sdpa"])
def test_image_blocks(original, image_model, image_inputs, assert_twins):
    assert assert_twins(image_model, image_inputs, original) == 4


@torch.no_grad()
def test_image_blocks_matter(image_model, image_inputs):
    """What `test_image_blocks` compares depends on the direction in which images are seen."""
    both_ways = _logits(image_model, image_inputs)
    causal = _logits(
        image_model, {**image_inputs, "token_type_ids": torch.zeros(len(PADDING), LENGTH).long()}
    )
    assert (both_ways - causal).abs().max() > 1e-2 * both_ways.abs().max()


@torch.no_grad()
def test_sinks_by_query(sink_model, assert_twins):
    assert assert_twins(sink_model, _padded_text(), "eager") > 0


@torch.no_grad()
def test_sinks_by_query_matter(sink_model):
    """What `test_sinks_by_query` compares depends on which query a sink belongs to."""
    inputs = _padded_text()
    by_query = _logits(sink_model, inputs)
    for layer in sink_model.model.layers:
        layer.self_attn.sink_proj.register_forward_hook(lambda _module, _inputs, sinks: sinks.roll(1, dims=1))
    assert (_logits(sink_model, inputs) - by_query).abs().max() > 1e-2 * by_query.abs().max()
