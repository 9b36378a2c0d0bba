"""Attention and recurrent layers of HuggingFace models, computed by subquad.

`patch(model)` registers subquad with transformers' `AttentionInterface` and its mask function with
`AttentionMaskInterface`, puts stand-ins in the place of transformers' recurrent functions, and switches one model over::

    with subquad.hf.patch(model) as handle, torch.no_grad():
        model.generate(**inputs)
    print(handle.report())

`GrowingCache(config=model.config)` is a `DynamicCache` that does not copy what it holds for every token; `generate` of a
patched model uses it.

Importing this package patches nothing.
"""

from subquad.hf.growing_cache import GrowingCache
from subquad.hf.patching import Patch, patch
from subquad.hf.report import Chunked, Delegated, Latent, LeftAlone, Recurrent, Replaced, Report

__all__ = [
    "Chunked",
    "Delegated",
    "GrowingCache",
    "Latent",
    "LeftAlone",
    "Patch",
    "Recurrent",
    "Replaced",
    "Report",
    "patch",
]
