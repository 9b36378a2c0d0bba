"""Patched models are trained: the gradients are those of the model without the patch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import transformers

import subquad.hf

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


def gradients(model, batch):
    """Returns loss and gradients of one step. What padding predicts does not count: patched, its attention is 0."""
    model.zero_grad()
    after_padding = torch.nn.functional.pad(batch.mask, (1, 0))[:, :-1] == 0
    labels = batch.ids.masked_fill((batch.mask == 0) | after_padding, -100)
    loss = model(batch.ids, attention_mask=batch.mask, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_close(actual, expected, tolerance=1e-9):
    assert actual[1].keys() == expected[1].keys()
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    for name, gradient in expected[1].items():
        error = float((actual[1][name] - gradient).abs().max())
        assert error <= tolerance * float(gradient.abs().max()) + 1e-12, name


# Random weights are large: in float32, rounding would decide.
@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("mistral-window", "sdpa"),
        ("gemma2", "eager"),
        ("gemma3", "sdpa"),
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("gpt-oss", "eager"),
        ("deepseek-v3", "sdpa"),
    ],
)
def test_gradients(name, original, decoder, make_batch):
    model = decoder(name, attn_implementation=original).double()
    if hasattr(model, "set_experts_implementation"):
        # The others know no float64.
        model.set_experts_implementation("eager")
    # Eager attention has its softmax in float32, where the mask of padding is infinite.
    batch = make_batch(left=5 if original == "sdpa" else 0)
    tolerance = 1e-9 if original == "sdpa" or name == "gpt2" else 1e-5
    expected = gradients(model, batch)
    with subquad.hf.patch(model) as handle:
        actual = gradients(model, batch)
        report = handle.report()
    assert_close(actual, expected, tolerance)
    assert (report.computed, report.delegated) == (model.config.num_hidden_layers, ())
    assert {one.original for one in report.replaced} == {original}
    if name == "gpt-oss":
        assert any("sinks" in of for of in expected[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, decoder, make_batch):
    model, batch = decoder("llama").double().train(), make_batch(left=5)
    expected = gradients(model, batch)
    # Its name in the transformers to come.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    with subquad.hf.patch(model) as handle:
        actual = gradients(model, batch)
        # Each of two layers once in the forward and once in the backward pass.
        assert (handle.report().computed, handle.report().delegated) == (4, ())
    assert_close(actual, expected)


def test_packed_documents(decoder, make_batch):
    model, batch = decoder("llama").double().train(), make_batch(20, size=1)
    positions = torch.cat([torch.arange(n) for n in (7, 9, 4)])[None]

    def step():
        model.zero_grad()
        model(batch.ids, position_ids=positions, labels=batch.ids, use_cache=False).loss.backward()
        return torch.zeros(()), {name: one.grad.clone() for name, one in model.named_parameters()}

    expected = step()
    with subquad.hf.patch(model) as handle:
        actual = step()
        assert (handle.report().computed, handle.report().dense) == (2, {})
    assert_close(actual, expected)


def test_half_precision(decoder, make_batch):
    model, batch = decoder("llama").train(), make_batch(left=5)
    exact = gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(model, batch)
        with subquad.hf.patch(model) as handle:
            patched = gradients(model, batch)
            assert (handle.report().computed, handle.report().delegated) == (2, ())

    def distance(step):
        return sum(float((step[1][name] - gradient).norm()) for name, gradient in exact[1].items())

    assert {x.dtype for x in patched[1].values()} == {torch.float32}
    assert 0 < distance(patched) <= 1.5 * distance(plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout(checkpointing, decoder, make_batch):
    model, batch = decoder("llama", attention_dropout=0.5).double().train(), make_batch()
    with subquad.hf.patch(model) as handle:
        torch.manual_seed(3)
        expected = gradients(model, batch)
        if checkpointing:
            # The second forward pass has to drop what the first did.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        torch.manual_seed(3)
        actual = gradients(model, batch)
        assert handle.report().delegated == ()
    assert_close(actual, expected)
    plain = gradients(model.eval(), batch)
    assert not torch.allclose(plain[0], expected[0])


class Repeated(torch.utils.data.Dataset):
    """The same few sequences."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(index + 2, index + 18) % 90 + 2
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.skipif(find_spec("accelerate") is None, reason="Trainer needs accelerate")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trainer(decoder, tmp_path):
    def losses(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Repeated())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(decoder("llama").double())
    model = decoder("llama").double()
    with subquad.hf.patch(model) as handle:
        actual = losses(model)
        report = handle.report()
    assert len(actual) == 6
    # As they are logged.
    assert actual == pytest.approx(expected, abs=2e-4)
    assert actual[-1] < actual[0] / 2
    assert (report.computed, report.delegated) == (6 * 2 * 2, ())


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lora(first, decoder, make_batch):
    peft = pytest.importorskip("peft")
    batch = make_batch(left=5)

    def adapted(model):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).train()

    expected = gradients(adapted(decoder("llama").double()), batch)
    model = decoder("llama").double()
    if first == "patch":
        with subquad.hf.patch(model) as handle:
            actual = gradients(adapted(model), batch)
            report = handle.report()
    else:
        wrapped = adapted(model)
        with subquad.hf.patch(wrapped.get_base_model()) as handle:
            actual = gradients(wrapped, batch)
            report = handle.report()
    assert all("lora" in name for name in expected[1])
    assert_close(actual, expected)
    assert (report.computed, report.delegated) == (2, ())
