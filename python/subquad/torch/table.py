"""The operators that PyTorch knows, as one table.

A row says how an operator is called, what it computes, what its results look like, and which row is its derivative. Both forms in
which PyTorch meets an operator are made from it: `subquad.torch.functions` makes the `torch.autograd.Function` of eager calls,
`subquad.torch.library` the custom operator that `torch.compile` and `torch.export` put into their graphs.
"""

from __future__ import annotations

from subquad.torch import (
    attention_operators,
    convolution_operators,
    recurrent_operators,
    scan_operators,
)

TABLE = (
    *attention_operators.OPERATORS,
    *recurrent_operators.OPERATORS,
    *convolution_operators.OPERATORS,
    *scan_operators.OPERATORS,
)
