"""Tiny models with recurrent layers, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..models import spread
from ..sizes import FIRST_TOKEN, LAST_TOKEN, tiny_config

GATED_DELTA = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
KDA = ("chunk_kda", "fused_recurrent_kda")
_CACHES = ("cache", "past_key_values", "cache_params")
LENGTH, LEFT = 70, 9
# Two tokens after each other, and pieces shorter and longer than a chunk, whose ends are no multiple of one.
STEPS, PIECES = (67, 68, 69, LENGTH), (13, 40, 41, LENGTH)


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Builds a model with random weights, always the same ones."""
    if kind not in CONFIG_MAPPING:
        raise LookupError(kind)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).eval().float()
    spread(model)
    return model.to(dtype)


def tokens(left: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids `[2, LENGTH]` and their mask, in which the first row begins with padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    return ids.masked_fill(mask == 0, 0), mask


def whole(model: Any, left: int = 0) -> torch.Tensor:
    """Returns the logits of tokens, without a cache."""
    ids, mask = tokens(left)
    logits: torch.Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


def in_parts(model: Any, ends: Sequence[int], left: int = 0) -> torch.Tensor:
    """Returns the logits of tokens, which are read part by part, with one cache."""
    ids, mask = tokens(left)
    past: dict[str, Any] = {}
    logits = []
    for start, end in zip((0, *ends), ends, strict=False):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **past)
        name = next(name for name in _CACHES if output.get(name) is not None)
        past = {name: output[name]}
        logits.append(output.logits)
    return torch.cat(logits, 1)[mask.bool()]


RUNS: dict[str, Callable[[Any], torch.Tensor]] = {
    "whole": whole,
    "whole, padded": lambda model: whole(model, LEFT),
    "decoding": lambda model: in_parts(model, STEPS),
    "decoding, padded": lambda model: in_parts(model, STEPS, LEFT),
    "in pieces": lambda model: in_parts(model, PIECES),
    "in pieces, padded": lambda model: in_parts(model, PIECES, LEFT),
}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference relative to the largest expected value."""
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(difference)
