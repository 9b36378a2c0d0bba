"""Patching, undoing, and what other models see of it."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import subquad.hf

TABLES = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)


def _registered():
    return ["subquad" in table for table in TABLES]


def _attributes(model):
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def _state(model):
    """Everything of a model and its configuration that a patch could change."""
    modules = {name: (type(module), module.forward) for name, module in model.named_modules()}
    return modules, _attributes(model), vars(model.config).copy(), list(model.state_dict())


@pytest.mark.parametrize(
    ("name", "original"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt-oss", "eager")]
)
def test_undo(name, original, decoder, make_batch):
    model = decoder(name)
    model.set_attn_implementation(original)
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask).logits
        before, tables = _state(model), [dict(table) for table in TABLES]
        handle = subquad.hf.patch(model)
        assert model.config._attn_implementation == "subquad"
        assert _registered() == [True, True]
        assert list(model.state_dict()) == before[3]
        model(batch.ids, attention_mask=batch.mask)
        assert handle.active
        handle.undo()
        assert not handle.active
        assert _state(model) == before
        assert [dict(table) for table in TABLES] == tables
        assert torch.equal(model(batch.ids, attention_mask=batch.mask).logits, expected)
        handle.undo()
        assert _state(model) == before
    assert "no longer patched" in str(handle.report())


def test_undo_restores_a_configuration_without_a_name(decoder):
    model = decoder("llama")
    model.config._attn_implementation = None
    with subquad.hf.patch(model) as handle:
        assert handle.report().replaced[0].original == "eager"
    assert model.config._attn_implementation is None


def test_context_with_an_error(decoder):
    model = decoder("llama")
    with pytest.raises(KeyError), subquad.hf.patch(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
    assert _registered() == [False, False]


def test_context_after_undo(decoder):
    handle = subquad.hf.patch(decoder("llama"))
    handle.undo()
    with pytest.raises(RuntimeError, match="undone"), handle:
        pass


def test_nested(decoder, make_batch):
    model = decoder("llama")
    ids = make_batch().ids
    with torch.no_grad(), subquad.hf.patch(model) as outer:
        model(ids)
        with subquad.hf.patch(model) as inner:
            model(ids)
            assert (outer.report().computed, inner.report().computed) == (4, 2)
            assert inner.report().replaced == outer.report().replaced
        assert model.config._attn_implementation == "subquad"
        model(ids)
        assert (outer.report().computed, inner.report().computed) == (6, 2)
    assert model.config._attn_implementation == "sdpa"


def test_undo_in_another_order(decoder, make_batch):
    model = decoder("llama")
    first, second = subquad.hf.patch(model), subquad.hf.patch(model)
    first.undo()
    with torch.no_grad():
        model(make_batch().ids)
    assert (first.report().computed, second.report().computed) == (0, 2)
    second.undo()
    assert model.config._attn_implementation == "sdpa"


def test_model_inside_a_patched_model(decoder, make_batch):
    model = decoder("llama")
    with torch.no_grad(), subquad.hf.patch(model.model) as inner:
        with subquad.hf.patch(model) as outer:
            model(make_batch().ids)
        assert (outer.report().computed, inner.report().computed) == (2, 2)
        assert model.config._attn_implementation == "subquad"
    assert model.config._attn_implementation == "sdpa"


def test_two_models(decoder, make_batch):
    first, second = decoder("llama"), decoder("llama")
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = second(batch.ids, attention_mask=batch.mask).logits
        with subquad.hf.patch(first) as handle:
            assert second.config._attn_implementation == "sdpa"
            assert torch.equal(second(batch.ids, attention_mask=batch.mask).logits, expected)
            assert handle.report().computed == 0
            with subquad.hf.patch(second):
                pass
            assert _registered() == [True, True]
            first(batch.ids)
            assert handle.report().computed == 2


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_two_models_with_one_configuration(original, decoder, make_batch, assert_same):
    first = decoder("llama")
    second = type(first)(first.config).eval()
    assert second.config is first.config
    first.set_attn_implementation(original)
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = second(batch.ids, attention_mask=batch.mask).logits
        with subquad.hf.patch(first) as handle:
            actual = second(batch.ids, attention_mask=batch.mask).logits
            report = handle.report()
    tokens = batch.mask.bool()
    assert torch.equal(actual[tokens], expected[tokens])
    assert report.computed == 0
    assert [(one.reason, one.original) for one in report.delegated] == [
        ("another model with the same configuration", original)
    ]


def test_originals_differ(decoder, make_batch, assert_same):
    first, second = decoder("llama"), decoder("qwen3")
    second.set_attn_implementation("eager")
    batch = make_batch(left=4)
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask}
    with torch.no_grad():
        expected = [model(**arguments, output_attentions=True) for model in (first, second)]
        with subquad.hf.patch(first), subquad.hf.patch(second):
            actual = [model(**arguments, output_attentions=True) for model in (first, second)]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.logits[batch.mask.bool()], other.logits[batch.mask.bool()])


def test_name_set_while_patched(decoder):
    model = decoder("llama")
    with subquad.hf.patch(model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"


def test_model_dropped_without_undo(decoder):
    model = decoder("llama")
    config = model.config
    subquad.hf.patch(model)
    assert _registered() == [True, True]
    assert config._attn_implementation == "subquad"
    del model
    gc.collect()
    assert config._attn_implementation == "sdpa"
    assert _registered() == [False, False]


def test_patch_stays_when_the_handle_is_dropped(decoder, make_batch):
    model = decoder("llama")
    subquad.hf.patch(model)
    gc.collect()
    assert model.config._attn_implementation == "subquad"
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        model(make_batch().ids)
        assert handle.report().computed == 2
    assert model.config._attn_implementation == "subquad"
    del model, handle
    gc.collect()


def test_copy_of_a_patched_model(decoder, make_batch, assert_same):
    model = decoder("llama")
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask).logits
        with subquad.hf.patch(model):
            duplicate = copy.deepcopy(model)
            assert_same(duplicate(batch.ids, attention_mask=batch.mask).logits, expected, batch.mask)
            with pytest.raises(ValueError, match="copy of a patched model"):
                subquad.hf.patch(duplicate)
        duplicate.set_attn_implementation("sdpa")
        with subquad.hf.patch(duplicate) as handle:
            assert_same(duplicate(batch.ids, attention_mask=batch.mask).logits, expected, batch.mask)
            assert handle.report().computed == 2


def test_module_of_no_patched_model(decoder):
    model, other = decoder("llama"), decoder("llama")
    with subquad.hf.patch(model):
        other.config._attn_implementation = "subquad"
        with pytest.raises(RuntimeError, match=r"not patched.*subquad\.hf\.patch"):
            other(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2), "gpt2"])
def test_no_model(model):
    with pytest.raises(TypeError, match=re.escape("expected a transformers.PreTrainedModel, got ")) as caught:
        subquad.hf.patch(model)
    assert type(model).__qualname__ in str(caught.value)


def test_model_without_the_interface():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(ValueError, match=r"subquad\.torch\.override_sdpa\(\)") as caught:
        subquad.hf.patch(model)
    assert "left alone: BloomAttention x1" in str(caught.value)
    assert model.config._attn_implementation != "subquad"
    assert _registered() == [False, False]


def test_part_without_the_interface():
    config = transformers.GitConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
        },
    )
    with subquad.hf.patch(transformers.GitForCausalLM(config)) as handle:
        report = handle.report()
    assert [one.name for one in report.replaced] == ["GitVisionAttention"]
    assert [one.name for one in report.left_alone] == ["GitSelfAttention"]
    assert "left alone: GitSelfAttention: its class does not use AttentionInterface" in str(report)


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|eager", "of the user"])
def test_implementations_that_cannot_be_delegated_to(name, decoder, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "of the user", lambda: None)
    model = decoder("llama")
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match=re.escape(f'"{name}"')):
        subquad.hf.patch(model)
    assert model.config._attn_implementation == name
    assert _registered() == [False, False]


def test_name_that_is_taken(decoder, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "subquad", lambda: None)
    model = decoder("llama")
    with pytest.raises(ValueError, match="already registered"):
        subquad.hf.patch(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()


def test_failure_while_patching(decoder, monkeypatch):
    model = decoder("llama")

    def fail(self, name):
        self.config._attn_implementation = name
        raise RuntimeError("on purpose")

    monkeypatch.setattr(type(model), "set_attn_implementation", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        subquad.hf.patch(model)
    assert model.config._attn_implementation == "sdpa"
    assert _registered() == [False, False]


def test_saving_while_patched(decoder, tmp_path):
    model = decoder("llama")
    with subquad.hf.patch(model):
        model.save_pretrained(tmp_path)
        pickle.loads(pickle.dumps(model))
    assert "subquad" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_report(decoder, make_batch):
    model = decoder("gemma3")
    ids = make_batch().ids
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        before = handle.report()
        model(ids)
        after = handle.report()
    assert (before.computed, after.computed) == (0, 2)
    assert str(after) == (
        "Gemma3ForCausalLM: patched by subquad\n"
        "  replaced: Gemma3Attention x2 (was sdpa)\n"
        "  generate: growing caches\n"
        "  long inputs in chunks: Gemma3RMSNorm x13, Gemma3MLP x2\n"
        "  computed by subquad: 2 calls"
    )


def test_report_of_dense_masks(decoder, make_batch):
    model = decoder("gemma3")
    ids = make_batch(12).ids
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        model(ids, attention_mask=mask)
        report = handle.report()
    assert dict(report.dense) == {"sliding_window": 1, "mask of the model": 1}
    assert "    with a dense mask: sliding_window: 1 call\n" in str(report)


def test_importing_subquad_imports_no_framework():
    code = "import sys, subquad; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_patches_nothing():
    assert _registered() == [False, False]
