"""Attention for CPUs: exact, sparse, linear and recurrent, for PyTorch and NumPy.

Importing this package patches nothing and imports neither PyTorch nor transformers. Optional parts are imported by name:
`subquad.torch` (override PyTorch's function), `subquad.hf` (patch HuggingFace models), `subquad.reference` (float64 oracles).
What describes arguments and needs NumPy only is imported when it is first used: `subquad.masks`, `subquad.normalizers`,
`subquad.biases`, `subquad.flash_attn` (the functions of FlashAttention), and `subquad.fla` (flash-linear-attention on CPUs).
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from ._native import __version__
from ._runtime import get_num_threads, set_num_threads, show_config
from .ops.backward import attention_backward, attention_varlen_backward
from .ops.exact import attention, scaled_dot_product_attention
from .ops.kvcache import attention_with_kvcache, merge_attention
from .ops.varlen import attention_varlen

if TYPE_CHECKING:
    from types import ModuleType

    from . import biases, fla, flash_attn, masks, normalizers

__all__ = [
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_with_kvcache",
    "biases",
    "fla",
    "flash_attn",
    "get_num_threads",
    "masks",
    "merge_attention",
    "normalizers",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
]

_LAZY = frozenset({"biases", "fla", "flash_attn", "masks", "normalizers"})


def __getattr__(name: str) -> "ModuleType":
    if name in _LAZY:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
