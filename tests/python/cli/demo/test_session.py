"""The demo from start to end, on a tiny model and with a stand-in for the patch."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from subquad.cli.demo import rounds, session, weights  # noqa: E402
from subquad.cli.demo.models import MODELS  # noqa: E402
from subquad.cli.demo.results import BASELINE, CANDIDATE  # noqa: E402
from subquad.cli.errors import CheckError, UserError  # noqa: E402


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, string, **_options):
        return {"input_ids": [ord(letter) % 97 for letter in string]}


@pytest.fixture
def prepared(monkeypatch, tmp_path, make_model, fake, keep_threads):
    """Replaces what is found and converted by tiny models, and the patch by the stand-in."""
    loaded: list[str] = []

    def load_model(directory, dtype):
        loaded.append(f"{directory.name} {dtype}")
        return make_model(dtype, family="gemma" if "Gemma" in directory.name else "llama")

    monkeypatch.setattr(weights, "locate", lambda model: weights.Weights(model, (), {}))
    monkeypatch.setattr(weights, "prepare_environment", lambda: None)
    monkeypatch.setattr(weights, "is_converted", lambda _source: True)
    monkeypatch.setattr(weights, "prepare", lambda source: tmp_path / source.model.name)
    monkeypatch.setattr(weights, "load_tokenizer", lambda _directory: Letters())
    monkeypatch.setattr(weights, "load_model", load_model)
    for name, variant in fake.variants.items():
        monkeypatch.setitem(rounds.VARIANTS, name, variant)
    return SimpleNamespace(loaded=loaded)


def measure(model, prompt, fake, recorder, **changes):
    options = {"time_budget": 1e9, "progress": recorder, "variants": fake.variants, **changes}
    return session.measure_dtype(model, "float32", prompt, 6, **options)


def run(**changes):
    options = {"dtypes": ("float32",), "prompt_tokens": 30, "new_tokens": 4, "threads": 1, "time_budget": 1e9}
    return session.run(weights.Weights(MODELS["smollm2"], (), {}), **{**options, **changes})


def test_comparison(model, prompt, fake, recorder):
    result = measure(model, prompt, fake, recorder)
    assert result.dtype == "float32"
    assert result.rounds == 3
    assert result.baseline.tokens == result.candidate.tokens
    found = result.comparison
    assert found.equal_tokens == 6
    assert found.prefill_speedup > 0
    assert found.decode_speedup is not None
    assert 0 < found.smallest_margin < math.inf
    assert found.quality.logit_difference < 1e-3
    assert found.quality.perplexity_baseline == pytest.approx(found.quality.perplexity_candidate, rel=1e-4)
    assert result.patch_report.startswith("Llama: patched\n")
    assert recorder.stages == [("float32: running", 8), ("float32: comparing logits", None)]


def test_comparison_of_one_round_and_token(model, prompt, fake, recorder):
    result = session.measure_dtype(
        model, "float32", prompt, 1, time_budget=1e-9, progress=recorder, variants=fake.variants
    )
    assert (result.rounds, result.comparison.decode_speedup, result.comparison.equal_tokens) == (1, None, 1)
    assert result.baseline.decode_seconds is None


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_real_patch(make_model, prompt, recorder, family):
    result = session.measure_dtype(
        make_model(family=family), "float32", prompt, 6, time_budget=1e-9, progress=recorder
    )
    assert result.comparison.equal_tokens == 6
    assert result.comparison.quality.logit_difference < 1e-3
    assert "delegated" not in result.patch_report


def test_without_a_baseline(model, prompt, fake, recorder):
    result = measure(model, prompt, fake, recorder, variants={CANDIDATE: fake.patch})
    assert (result.rounds, result.baseline, result.comparison) == (3, None, None)
    assert len(result.candidate.tokens) == 6
    assert fake.log == [CANDIDATE] * 4
    assert recorder.stages == [("float32: running", 4)]


def test_a_patch_that_delegates_everything_is_found_without_a_baseline(model, prompt, fake, recorder):
    fake.computed = 0
    with pytest.raises(CheckError, match="never called subquad"):
        measure(model, prompt, fake, recorder, variants={CANDIDATE: fake.patch})


@pytest.mark.usefixtures("other_tokens")
def test_other_tokens_are_found(model, prompt, fake, recorder):
    result = measure(model, prompt, fake, recorder)
    assert result.comparison.equal_tokens < 6
    assert result.baseline.tokens != result.candidate.tokens


def test_agreement_ends_at_the_first_difference():
    assert session._agreement((1, 2, 3), (1, 2, 3)) == 3
    assert session._agreement((1, 2, 3), (1, 9, 3)) == 1
    assert session._agreement((1,), (2,)) == 0


def test_a_patch_that_does_nothing_is_found(model, prompt, fake, recorder):
    fake.implementation = "sdpa"
    with pytest.raises(CheckError, match="both runs used the attention 'sdpa'"):
        measure(model, prompt, fake, recorder)


def test_a_patch_that_delegates_everything_is_found(model, prompt, fake, recorder):
    fake.computed = 0
    with pytest.raises(CheckError, match="never called subquad"):
        measure(model, prompt, fake, recorder)


def test_a_patch_that_is_not_undone_is_found(model, prompt, fake, recorder):
    def patch(one):
        one.config._attn_implementation = "eager"
        return nullcontext(fake)

    with pytest.raises(CheckError, match="both runs used the attention 'eager'"):
        measure(model, prompt, fake, recorder, variants={**fake.variants, CANDIDATE: patch})


def test_tokens_that_change_from_round_to_round_are_found(model, prompt, fake, recorder):
    turns = iter(range(100))

    def sometimes(one):
        if next(turns) != 2:
            return lambda: None
        weight = one.get_output_embeddings().weight.data.neg_()
        return weight.neg_

    fake.change = sometimes
    with pytest.raises(CheckError, match="subquad in float32 generated different tokens in different rounds"):
        measure(model, prompt, fake, recorder)


def test_whole(prepared, fake):
    result = run(dtypes=("float32", "bfloat16"))
    assert prepared.loaded == ["SmolLM2-135M-Instruct float32", "SmolLM2-135M-Instruct bfloat16"]
    assert result.model == "SmolLM2-135M-Instruct"
    assert (result.prompt_tokens, result.new_tokens, result.threads) == (30, 4, 1)
    assert [one.dtype for one in result.dtypes] == ["float32", "bfloat16"]
    assert result.passed
    assert result.seconds > 0


def test_only_float32_decides(make_result):
    assert make_result().passed
    assert not make_result(equal=63).passed
    result = make_result(equal=0)
    assert replace(result, dtypes=result.dtypes[1:]).passed
    assert make_result(comparison=None).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 1}, "--tokens: perplexity needs at least 2 tokens, got 1"),
        ({"prompt_tokens": 10_000_000}, "--tokens: the text gives"),
        (
            {"prompt_tokens": 600},
            "--tokens plus --new-tokens: SmolLM2-135M-Instruct takes 600 positions, got 604",
        ),
    ],
)
def test_requests_that_cannot_be_met(prepared, changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        run(**changes)


def test_the_budget_is_shared(prepared, monkeypatch, clock, make_result):
    budgets = []

    def measure_dtype(*_arguments, time_budget, **_options):
        budgets.append(time_budget)
        clock.sleep(70.0)
        return make_result().dtypes[0]

    monkeypatch.setattr(session, "measure_dtype", measure_dtype)
    monkeypatch.setattr(session, "time", clock)
    run(dtypes=("float32", "bfloat16"), time_budget=100.0)
    assert budgets == [50.0, 30.0]


def test_command(prepared, cli, tmp_path):
    path = tmp_path / "results.json"
    answer = cli("demo", "smollm2", "--tokens", 24, "--new-tokens", 5, "--threads", 1, "--json", path)
    assert answer.status == 0, answer.err
    assert "PASS  float32: same greedy tokens: 5 of 5" in answer.out
    assert "info  bfloat16: " in answer.out
    assert "replaced: LlamaAttention x2" in answer.out
    assert answer.out.count("Patched") == 1
    for label in ("loading torch", "checking the converted model", "float32: running", "bfloat16: running"):
        assert label in answer.err
    document = json.loads(path.read_text())
    assert document["passed"] is True
    (one,) = document["models"]
    assert one["model"] == "SmolLM2-135M-Instruct"
    assert one["dtypes"][0]["baseline"]["tokens"] == one["dtypes"][0]["candidate"]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        ([], ["SmolLM2-135M-Instruct float32", "SmolLM2-135M-Instruct bfloat16", "Gemma-3-270M bfloat16"]),
        (["gemma"], ["Gemma-3-270M bfloat16"]),
        (["gemma", "gemma", "--dtype", "float32"], ["Gemma-3-270M float32"]),
        (["--dtype", "float32"], ["SmolLM2-135M-Instruct float32", "Gemma-3-270M float32"]),
        (["gemma", "--dtype", "both"], ["Gemma-3-270M float32", "Gemma-3-270M bfloat16"]),
    ],
)
def test_models_and_precisions(prepared, cli, arguments, loaded):
    answer = cli("demo", "--tokens", 24, "--new-tokens", 2, "--time-budget", 0.001, *arguments)
    assert answer.status == 0, answer.err
    assert prepared.loaded == loaded
    assert [
        line.partition(": 24 tokens")[0] for line in answer.out.splitlines() if " tokens of prompt" in line
    ] == [*dict.fromkeys(each.partition(" ")[0] for each in loaded)]


def test_command_with_an_unknown_model(prepared, cli):
    answer = cli("demo", "gemma", "llama")
    assert answer.status == 2
    assert answer.err == "subquad: error: unknown model llama; there are smollm2, gemma\n"
    assert prepared.loaded == []


def test_command_without_a_baseline(prepared, cli, fake, tmp_path):
    path = tmp_path / "results.json"
    answer = cli("demo", "gemma", "--no-baseline", "--tokens", 24, "--new-tokens", 2, "--json", path)
    assert answer.status == 0, answer.err
    assert BASELINE not in fake.log
    assert "bfloat16  subquad" in answer.out
    assert "sdpa" not in answer.out
    document = json.loads(path.read_text())
    assert document["models"][0]["dtypes"][0]["comparison"] is None


@pytest.mark.usefixtures("other_tokens")
def test_one_model_with_other_tokens_is_enough_for_status_1(prepared, cli):
    # In bfloat16, in which Gemma runs, other tokens are no failure.
    answer = cli("demo", "--tokens", 24, "--new-tokens", 5, "--time-budget", 0.001)
    assert answer.status == 1
    assert "FAIL  float32" in answer.out
    assert "\nGemma-3-270M: " in answer.out


@pytest.mark.usefixtures("other_tokens")
def test_command_with_other_tokens_has_status_1(prepared, cli):
    answer = cli("demo", "smollm2", "--tokens", 24, "--new-tokens", 5, "--dtype", "float32")
    assert answer.status == 1
    assert "FAIL  float32: same greedy tokens for the first" in answer.out


@pytest.mark.usefixtures("other_tokens")
def test_command_in_bfloat16_only_informs(prepared, cli):
    answer = cli("demo", "smollm2", "--tokens", 24, "--new-tokens", 5, "--dtype", "bfloat16")
    assert answer.status == 0
    assert "info  bfloat16: same greedy tokens for the first" in answer.out
    assert prepared.loaded == ["SmolLM2-135M-Instruct bfloat16"]


def test_command_whose_patch_does_nothing(prepared, cli, fake):
    fake.implementation = "sdpa"
    answer = cli("demo", "smollm2", "--tokens", 24, "--new-tokens", 5, "--dtype", "float32")
    assert answer.status == 1
    assert answer.out == ""
    assert answer.err.endswith("subquad: check failed: both runs used the attention 'sdpa'\n")


def test_command_checks_the_file_first(prepared, cli, tmp_path):
    answer = cli("demo", "--json", tmp_path / "no" / "x.json")
    assert answer.status == 2
    assert prepared.loaded == []
    assert answer.err.count("\n") == 1
