"""A pair of tiny models with the same weights: one with eager attention, one as users get it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from subquad.hf.interface import interface_modules
from subquad.hf.recurrent import recurrent_modules

from .catalogue import Entry
from .sizes import tiny_config

# What fits the memory of a small machine twice and runs in seconds.
_MAX_PARAMETERS = 100_000_000
_SEED = 5
NO_SEAM = "no attention through AttentionInterface"
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


class NotBuiltError(Exception):
    """A model that cannot be built from its configuration alone; the message says why, in one line."""


@dataclass(frozen=True)
class Pair:
    """Two models of one configuration with the same weights.

    Attributes:
        eager: With the implementation "eager", never patched.
        default: With the implementation that transformers chooses.
    """

    eager: PreTrainedModel
    default: PreTrainedModel


def reason(error: BaseException) -> str:
    """Returns an error as one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def spread(model: torch.nn.Module) -> None:
    """Gives a model weights that make attention matter.

    With the usual standard deviation of 0.02 attention is nearly uniform, gates of zero switch parts off, and
    a lost mask hardly changes what comes out.
    """
    generator = torch.Generator().manual_seed(_SEED)
    convolutions = {id(one.weight) for one in model.modules() if isinstance(one, _CONVOLUTIONS)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or weight.numel() == 0:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                if float(weight.abs().max()) < 1e-3:
                    weight.copy_(noise * 0.3)
                continue
            # The weights of experts are stacked matrices.
            fan_in = weight[0].numel() if id(weight) in convolutions else weight.shape[-1]
            weight.copy_(noise * (1.0 if "embed" in name else 1.2 / math.sqrt(fan_in)))


def _class(entry: Entry) -> Any:
    found = getattr(transformers, entry.name, None)
    if found is None:
        raise NotBuiltError(f"transformers does not export {entry.name}")
    return found


def _build(cls: Any, config: Any, **options: Any) -> PreTrainedModel:
    torch.manual_seed(_SEED)
    model: PreTrainedModel = cls._from_config(copy.deepcopy(config), **options)
    return model.eval().float()


def build(entry: Entry) -> Pair:
    """Builds both models.

    Raises:
        NotBuiltError: The class has no tiny form that the rules find, or it needs a package that is not there.
    """
    try:
        cls, config = _class(entry), tiny_config(entry.kind)
        with torch.device("meta"):
            outline = cls._from_config(copy.deepcopy(config))
        if not (interface_modules(outline) or recurrent_modules(outline)):
            raise NotBuiltError(NO_SEAM)
        size = sum(one.numel() for one in outline.parameters())
        if size > _MAX_PARAMETERS:
            raise NotBuiltError(f"not small: {size // 1_000_000} million parameters")
        eager = _build(cls, config, attn_implementation="eager")
        default = _build(cls, config)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(reason(error)) from error
    spread(eager)
    default.load_state_dict(eager.state_dict())
    return Pair(eager, default)
