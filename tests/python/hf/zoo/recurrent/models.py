"""Tiny models with recurrent layers, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..models import spread
from ..sizes import FIRST_TOKEN, LAST_TOKEN, tiny_config

# Operators of several tokens and of one.
GATED_DELTA = ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
KDA = ("chunk_kda", "fused_recurrent_kda")
MAMBA = ("selective_scan_fn", "selective_state_update")
MAMBA2 = ("mamba_chunk_scan_combined", "selective_state_update")
CONVOLUTION = ("causal_conv1d_fn", "causal_conv1d_update")
_CACHES = ("cache", "past_key_values", "cache_params", "state")
# Models that take the mask of the tokens they are given, not of those in their cache.
_OWN_MASKS = ("mamba", "falcon_mamba")
_SIZES: dict[str, dict[str, Any]] = {
    # The list of layers is not shortened, as its length follows from other fields.
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    # Widths are rounded up to multiples of 64, of states but not of what is written to them.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
}
LENGTH, LEFT = 70, 9
# Two tokens after each other, and pieces shorter and longer than a chunk, whose ends are no multiple of one.
STEPS, PIECES = (67, 68, 69, LENGTH), (13, 40, 41, LENGTH)


def build(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Builds a model with random weights, always the same ones."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = tiny_config(kind)
    for name, value in _SIZES.get(kind, {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
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
        first = start if model.config.model_type in _OWN_MASKS else 0
        output = model(ids[:, start:end], attention_mask=mask[:, first:end], use_cache=True, **past)
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
