"""One run of the model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from subquad.cli.demo.run import run_once  # noqa: E402


def test_against_generate(model, prompt):
    run = run_once(model, prompt, 9)
    with torch.no_grad():
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=None,
        )
        hidden = model.base_model(input_ids=prompt).last_hidden_state[0]
    assert list(run.tokens) == whole[0, prompt.shape[1] :].tolist()
    torch.testing.assert_close(run.hidden, hidden)
    assert run.hidden.shape == (40, 16)
    assert run.prefill_seconds > 0
    assert run.decode_seconds is not None
    assert run.decode_seconds > 0
    assert run.implementation == "sdpa"


def test_margins(model, prompt):
    run = run_once(model, prompt, 3)
    sequence = torch.cat([prompt, torch.tensor([run.tokens[:-1]])], dim=1)
    with torch.no_grad():
        best = model(input_ids=sequence).logits[0, -3:].topk(2).values
    assert run.margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-4)
    assert len(run.margins) == 3


def test_the_end_of_the_sequence_does_not_stop_it(model, prompt):
    model.config.eos_token_id = run_once(model, prompt, 2).tokens[0]
    model.generation_config.eos_token_id = model.config.eos_token_id
    assert len(run_once(model, prompt, 5).tokens) == 5


def test_one_token(model, prompt):
    run = run_once(model, prompt, 1)
    assert run.decode_seconds is None
    assert len(run.tokens) == len(run.margins) == 1


def test_repeats_are_equal_and_leave_no_hook(model, prompt):
    first, second = run_once(model, prompt, 4), run_once(model, prompt, 4)
    assert first.tokens == second.tokens
    assert torch.equal(first.hidden, second.hidden)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_hook_is_left_after_a_failure(model):
    with pytest.raises(IndexError):
        run_once(model, torch.tensor([[1_000_000]]), 1)
    assert not any(module._forward_hooks for module in model.modules())


def test_memory(model, prompt):
    run = run_once(model, prompt, 2)
    assert run.peak_bytes is None or 0 <= run.peak_bytes < 64 << 20
