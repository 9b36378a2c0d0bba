"""All operators that PyTorch knows: the rows of one table."""

from __future__ import annotations

from subquad.torch import operators, scan_operators

TABLE = (*operators.OPERATORS, *scan_operators.OPERATORS)
