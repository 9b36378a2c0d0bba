"""Which models there are: one class of transformers' auto mappings for each model type."""

from __future__ import annotations

from typing import NamedTuple

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


class Entry(NamedTuple):
    """One model of the zoo.

    Attributes:
        kind: The model type, as in `config.json`.
        name: The class.
    """

    kind: str
    name: str


# The first mapping that has a model type gives its class: what generates comes before what it is made of, and
# what sees both ways before what can be made causal.
_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_TEXT_TO_WAVEFORM",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_RNNT",
    "MODEL_FOR_CTC",
    "MODEL",
    "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_PRETRAINING",
    "MODEL_FOR_KEYPOINT_MATCHING",
    "MODEL_FOR_DEPTH_ESTIMATION",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION",
)


def _mapping(name: str) -> dict[str, str]:
    table = getattr(modeling_auto, f"{name}_MAPPING_NAMES", {})
    return {kind: names if isinstance(names, str) else names[0] for kind, names in table.items()}


def entries() -> tuple[Entry, ...]:
    """Returns the models of the installed transformers, sorted by type."""
    found: dict[str, str] = {}
    for name in _MAPPINGS:
        for kind, cls in _mapping(name).items():
            found.setdefault(kind, cls)
    return tuple(Entry(kind, found[kind]) for kind in sorted(found) if kind in CONFIG_MAPPING_NAMES)
