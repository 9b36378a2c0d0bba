"""Attention for CPUs: exact, sparse, linear and recurrent, for PyTorch and NumPy.

Importing this package patches nothing and imports neither PyTorch nor transformers. Optional parts are imported by name:
`subquad.torch` (override PyTorch's function), `subquad.hf` (patch HuggingFace models), `subquad.reference` (float64 oracles).
"""

from ._native import __version__
from ._runtime import get_num_threads, set_num_threads, show_config
from .ops.exact import attention, scaled_dot_product_attention
from .ops.kvcache import attention_with_kvcache, merge_attention

__all__ = [
    "__version__",
    "attention",
    "attention_with_kvcache",
    "get_num_threads",
    "merge_attention",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
]
