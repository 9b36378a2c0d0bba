"""The example that fine-tunes a model, on a tiny one."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def example(load_example):
    """The example as a module."""
    return load_example("finetune_smollm2")


@pytest.fixture
def model():
    """A tiny Llama of SmolLM2's form."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=4,
    )
    config._attn_implementation = "sdpa"
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_both_runs_learn_the_same(example, model, tmp_path):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    sequences = torch.arange(24).repeat(6, 1) % 7
    runs = example.compare(model, sequences, seed=0)
    assert list(runs) == ["torch", "subquad", "none"]
    torch.testing.assert_close(
        *(torch.tensor(runs[name].losses) for name in ("torch", "subquad")), rtol=0, atol=1e-4
    )
    for run in runs.values():
        assert len(run.losses) == len(run.seconds) == 6
        assert run.losses[-1] < run.losses[0]
    assert runs["none"].losses != runs["torch"].losses
    assert model.config._attn_implementation == "sdpa"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    lines = example.report(runs)
    assert lines[0].startswith("torch")
    assert "losses differ by" in lines[-1]
    example.plot(runs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_the_share_is_that_of_the_same_steps(example):
    run, rest = example.Training(seconds=[9.0, 3.0, 5.0, 9.0]), example.Training(seconds=[1.0, 2.0, 4.0, 2.0])
    assert run.seconds_beyond(rest) == 1.0


def test_the_stand_in_has_gradients_everywhere(example):
    q = torch.randn(2, 6, 5, 4, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(2))
    out, weights = example.without_attention(None, q, k, v, None, scaling=0.5)
    assert weights is None
    expected = q + (k + v).repeat_interleave(3, 1)
    assert torch.equal(out, expected.transpose(1, 2))
    assert all(x is not None for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--tokens", "1"], ["--steps", "many"]])
def test_numbers_are_checked(example, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        example.main(arguments)
    assert error.value.code == 2
    assert "--" in capsys.readouterr().err
