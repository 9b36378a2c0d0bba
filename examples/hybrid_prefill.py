"""Times a model of Qwen3-Next's shape, with random weights, before and after `subquad.hf.patch`.

Three of its four layers are gated delta rules, the fourth is attention; hidden size 1024. Prompts and tokens take turns,
unpatched and patched, and medians are shown. Outputs are compared, too.

    python examples/hybrid_prefill.py --tokens 4096 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import trange
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import subquad.hf


@dataclass
class Run:
    """Seconds of prompts and of tokens after them, and the last logits of a prompt."""

    prompts: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    logits: torch.Tensor | None = None


def build(dtype: torch.dtype, hidden: int = 1024) -> Qwen3NextForCausalLM:
    """Returns the model: four layers, few and small experts."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=1024,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=1,
        head_dim=128,
        linear_num_key_heads=max(1, hidden // 128),
        linear_num_value_heads=max(2, hidden // 64),
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        shared_expert_intermediate_size=hidden // 2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3NextForCausalLM(config).eval().to(dtype)


@contextmanager
def patched(model: torch.nn.Module) -> Iterator[None]:
    """Runs a model on subquad within the block."""
    handle = subquad.hf.patch(model)
    try:
        yield
    finally:
        handle.undo()


@contextmanager
def unpatched(_model: torch.nn.Module) -> Iterator[None]:
    """Leaves a model as it is."""
    yield


WAYS: dict[str, Callable] = {"transformers": unpatched, "subquad": patched}


@torch.inference_mode()
def measure(model: torch.nn.Module, ids: torch.Tensor, run: Run, new_tokens: int) -> None:
    """Times one prompt and the tokens that follow it."""
    start = time.perf_counter()
    result = model(ids, use_cache=True, logits_to_keep=1)
    run.prompts.append(time.perf_counter() - start)
    run.logits = result.logits.float()
    # Transformers renamed it.
    name = "cache" if getattr(result, "cache", None) is not None else "past_key_values"
    cache = {name: result[name]}
    token = ids[:, -1:]
    for _ in range(new_tokens):
        start = time.perf_counter()
        model(token, use_cache=True, **cache)
        run.tokens.append(time.perf_counter() - start)


def compare(model: torch.nn.Module, ids: torch.Tensor, *, rounds: int, new_tokens: int) -> dict[str, Run]:
    """Returns the runs of each way, which take turns; the first round warms up."""
    runs = {name: Run() for name in WAYS}
    for turn in trange(rounds + 1, desc="rounds"):
        for name, way in WAYS.items():
            with way(model):
                measure(model, ids, runs[name] if turn else Run(), new_tokens)
    return runs


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens after it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    model = build(getattr(torch, given.dtype))
    ids = torch.randint(0, 1024, (1, given.tokens), generator=torch.Generator().manual_seed(1))
    runs = compare(model, ids, rounds=given.rounds, new_tokens=given.new_tokens)
    for name, run in runs.items():
        prompt, token = statistics.median(run.prompts), statistics.median(run.tokens)
        print(f"{name:>13}: prompt {prompt:7.3f} s, token {1e3 * token:7.2f} ms")
    before, after = runs["transformers"], runs["subquad"]
    for what in ("prompts", "tokens"):
        ratio = statistics.median(getattr(before, what)) / statistics.median(getattr(after, what))
        print(f"{what}: {ratio:.2f} times as fast")
    if before.logits is not None and after.logits is not None:
        difference = (before.logits - after.logits).abs().max() / before.logits.abs().max()
        print(f"largest difference of logits: {difference:.1e} of the largest")


if __name__ == "__main__":
    main()
