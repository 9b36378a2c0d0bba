"""Oracles: every operator in NumPy float64, in the words of its equation. They import nothing but NumPy and are never fast.

Inputs of any floating dtype are widened exactly; results are float64.
"""

from . import recurrent
from .backward import attention_backward
from .exact import attention, scaled_dot_product_attention
from .varlen import attention_varlen

__all__ = ["attention", "attention_backward", "attention_varlen", "recurrent", "scaled_dot_product_attention"]
