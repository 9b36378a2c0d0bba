"""Is a benchmarked result right? Some rows against the float64 oracle, all against torch."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from subquad.cli.bench.shapes import Shape
from subquad.cli.bench.tensors import Inputs, to_float64
from subquad.reference import exact

_ROWS = 4
# Standard normal values average towards zero over many keys, so the error is held against the values, not the
# results: one unit of rounding of the dtype for the probabilities, one for the output, and float32
# accumulation below both.
_TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        error: Largest absolute error of the checked rows.
        failure: What is wrong; empty if nothing.
    """

    error: float
    failure: str = ""


def _rows(shape: Shape) -> list[slice]:
    starts = {0, max(0, shape.queries // 2 - 1), max(0, shape.queries - _ROWS)}
    return [slice(start, min(start + _ROWS, shape.queries)) for start in sorted(starts)]


def _oracle_error(shape: Shape, inputs: Inputs, out: Any, entry: int, rows: slice) -> float:
    # Bottom-right alignment over the first `visible` keys is exactly what these rows see of all keys.
    keys = shape.keys_of(entry)
    visible = max(rows.stop + keys - shape.queries, 0) if shape.causal else keys
    one, group = slice(entry, entry + 1), shape.heads // shape.kv_heads
    errors = []
    # One key/value head after another: in float64 and repeated for each query head, a long cache is large.
    for head in range(shape.kv_heads):
        shared, heads = slice(head, head + 1), slice(head * group, (head + 1) * group)
        k, v = (to_float64(array[one, :visible, shared]) for array in (inputs.k, inputs.v))
        expected = exact.attention(to_float64(inputs.q[one, rows, heads]), k, v, **shape.options(heads))
        errors.append(np.max(np.abs(to_float64(out[one, rows, heads]) - expected)))
    return float(np.max(errors))


def check(shape: Shape, dtype: str, inputs: Inputs, out: Any, theirs: Any | None) -> Check:
    """Checks a result of attention.

    Args:
        shape: What was computed.
        dtype: In which element type.
        inputs: From what.
        out: The result, `[B, Sq, H, Dv]`.
        theirs: torch's result, `[B, H, Sq, Dv]`, if there is one.

    Returns:
        The largest error against the oracle (some rows of the first and of the last batch entry), and what is
        wrong, if anything.
    """
    expected_shape = (shape.batch, shape.queries, shape.heads, shape.head_dim_v)
    if tuple(out.shape) != expected_shape or out.dtype != inputs.q.dtype:
        return Check(
            float("nan"), f"expected {expected_shape} {inputs.q.dtype}, got {tuple(out.shape)} {out.dtype}"
        )
    limit = _TOLERANCE[dtype]
    errors = [
        _oracle_error(shape, inputs, out, entry, rows)
        for entry in sorted({0, shape.batch - 1})
        for rows in _rows(shape)
    ]
    # NumPy's maximum keeps a NaN, Python's may lose it; and a NaN must not pass the comparison.
    error = float(np.max(errors))
    if not error <= limit:
        return Check(error, f"off by {error:.3g} from the float64 oracle (allowed: {limit:.3g})")
    values = to_float64(out)
    if not np.isfinite(values).all():
        return Check(error, "NaN or infinity in the result")
    if theirs is not None:
        distance = float(np.max(np.abs(values - to_float64(theirs.transpose(1, 2)))))
        if not distance <= 2 * limit:
            return Check(error, f"off by {distance:.3g} from torch (allowed: {2 * limit:.3g})")
    return Check(error)
