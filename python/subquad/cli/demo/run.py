"""One measured run of the model: prefill, then greedy decoding, with one way of computing attention."""

import inspect
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from subquad.cli.peak_memory import peak_memory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """What one run measured and produced.

    Attributes:
        prefill_seconds: The forward pass over the prompt, to the choice of the first new token.
        decode_seconds: Mean of one later token; `None` if only one token was generated.
        peak_bytes: Peak memory above the loaded model over both; `None` if the system does not tell.
        tokens: The generated token ids.
        margins: For each of them, how far its logit was ahead of the second best.
        hidden: Last hidden states of the prompt, `[S, hidden_size]`, before the output projection.
        implementation: The name under which transformers knows the attention that ran.
    """

    prefill_seconds: float
    decode_seconds: float | None
    peak_bytes: int | None
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    hidden: "torch.Tensor"
    implementation: str


@contextmanager
def _capture_hidden(model: Any) -> Generator[list["torch.Tensor"]]:
    # The model computes the hidden states of the whole prompt anyway; keeping a reference makes them
    # available for perplexity without `[S, vocabulary]` logits (800 MB at 4,096 tokens) and without a second
    # prefill.
    captured: list[torch.Tensor] = []

    def keep(_module: Any, _arguments: Any, output: Any) -> None:
        captured.append(output[0])

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def _show_layers(model: Any, show: Callable[[str], None]) -> Generator[None]:
    layers = model.base_model.layers
    numbers = count(1)

    def after(_module: Any, _arguments: Any, _output: Any) -> None:
        show(f"prefill, layer {next(numbers)} of {len(layers)}")

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(after).remove)
        yield


def _cache_argument(model: Any) -> str:
    # Later versions of transformers call it `cache` and warn of the old name.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _choose(logits: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    best = logits[:, -1].topk(2)
    return best.indices[:, :1], best.values[0, 0] - best.values[0, 1]


def _new_cache(model: Any, *, patched: bool) -> Any:
    """Returns the cache that the model's `generate` would use."""
    if patched:
        from subquad.hf import GrowingCache

        return GrowingCache(config=model.config)
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _show_nothing(_detail: str) -> None:
    return None


def run_once(
    model: Any,
    prompt: "torch.Tensor",
    new_tokens: int,
    *,
    patched: bool = False,
    show: Callable[[str], None] = _show_nothing,
) -> Run:
    """Prefills the prompt and generates greedily; the end-of-sequence token does not stop it.

    Args:
        model: A causal language model of transformers, as it is to be measured.
        prompt: Token ids, `[1, S]`.
        new_tokens: How many tokens to generate, at least 1.
        patched: Whether the model is patched by subquad.
        show: Told after each layer of the prefill and each later token how far the run has come.

    Returns:
        The measurements and the results.
    """
    import torch

    with torch.no_grad(), peak_memory() as peak:
        options = {
            _cache_argument(model): _new_cache(model, patched=patched),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with _capture_hidden(model) as captured, _show_layers(model, show):
            start = time.perf_counter()
            output = model(input_ids=prompt, **options)
            token, margin = _choose(output.logits)
            tokens, margins = [int(token.item())], [margin]
            prefilled = time.perf_counter()
        for _ in range(new_tokens - 1):
            output = model(input_ids=token, **options)
            token, margin = _choose(output.logits)
            tokens.append(int(token.item()))
            margins.append(margin)
            show(f"token {len(tokens)} of {new_tokens}")
        end = time.perf_counter()
        hidden = captured[0][0]
        del options, output, captured
    return Run(
        prefill_seconds=prefilled - start,
        decode_seconds=(end - prefilled) / (new_tokens - 1) if new_tokens > 1 else None,
        peak_bytes=peak.bytes,
        tokens=tuple(tokens),
        margins=tuple(float(margin.item()) for margin in margins),
        hidden=hidden,
        implementation=str(getattr(model.config, "_attn_implementation", "")),
    )
