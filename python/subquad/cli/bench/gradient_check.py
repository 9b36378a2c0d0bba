"""Are benchmarked gradients right? One head against float64, all against torch."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from subquad.cli.bench.shapes import WindowedShape
from subquad.cli.bench.tensors import Inputs, to_float64
from subquad.cli.bench.verify import Check
from subquad.reference.visibility import visible_keys
from subquad.reference.weights import softmax

Float64 = npt.NDArray[np.float64]

# Queries that the oracle takes at a time: their scores are a matrix.
_CHUNK = 256
# Of the largest value of a result where that is above 1. A gradient of a key or value is a sum over thousands of
# queries, whose weights are all computed anew from a rounded log-sum-exp.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 2.4e-2}


class Results(NamedTuple):
    """What forward and backward give, `[B, S, H, D]`.

    Attributes:
        out: The output.
        dq: The gradient of the queries.
        dk: The gradient of the keys.
        dv: The gradient of the values.
    """

    out: Any
    dq: Any
    dk: Any
    dv: Any


def _expected(shape: WindowedShape, inputs: Inputs, do: Float64) -> Results:
    """Returns the results by their definition, for one sequence and the heads that share a key/value head.

    Args:
        shape: What is computed.
        inputs: `[Sq, G, D]`, `[Sk, D]` and `[Sk, Dv]` in float64.
        do: `[Sq, G, Dv]`.
    """
    q, k, v = inputs
    out, dq, dk, dv = np.zeros_like(do), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale, offset = shape.head_dim**-0.5, shape.keys - shape.queries
    for start in range(0, shape.queries, _CHUNK):
        rows = slice(start, min(start + _CHUNK, shape.queries))
        # Bottom-right alignment over these keys is exactly what these queries see of all keys.
        last = rows.stop + offset if shape.causal else shape.keys
        seen = slice(max(start + offset - shape.window, 0) if shape.window else 0, last)
        if last <= 0:
            continue
        keys, values = k[seen], v[seen]
        queries, upstream = q[rows].swapaxes(0, 1), do[rows].swapaxes(0, 1)
        visible = visible_keys(
            (1, *queries.shape[:2], len(keys)),
            causal=shape.causal,
            window_size=(shape.window or None, None),
            mask=None,
        )[0]
        scores = scale * (queries @ keys.T)
        part, lse = softmax(scores, visible, np.broadcast_to(values, (len(queries), *values.shape)))
        weights = np.exp(np.where(visible, scores - lse[..., None], -np.inf))
        dscores = scale * weights * (upstream @ values.T - (upstream * part).sum(-1, keepdims=True))
        out[rows], dq[rows] = part.swapaxes(0, 1), (dscores @ keys).swapaxes(0, 1)
        dk[seen] += np.einsum("hij,hid->jd", dscores, queries, optimize=True)
        dv[seen] += np.einsum("hij,hid->jd", weights, upstream, optimize=True)
    return Results(out, dq, dk, dv)


def _distances(found: Results, expected: Results) -> list[float]:
    """Returns the largest distance of each result, as a multiple of the largest value where that is above 1."""
    return [
        # NumPy's maximum keeps a NaN, Python's may lose it.
        float(np.max(np.abs(to_float64(one) - other)) / np.maximum(1.0, np.max(np.abs(other))))
        for one, other in zip(found, expected, strict=True)
    ]


def _oracle_distances(shape: WindowedShape, inputs: Inputs, do: Any, found: Results) -> list[float]:
    entry, head, group = shape.batch - 1, shape.kv_heads - 1, shape.heads // shape.kv_heads
    heads = slice(head * group, (head + 1) * group)
    q, upstream = to_float64(inputs.q[entry, :, heads]), to_float64(do[entry, :, heads])
    k, v = to_float64(inputs.k[entry, :, head]), to_float64(inputs.v[entry, :, head])
    cut = Results(
        found.out[entry, :, heads],
        found.dq[entry, :, heads],
        found.dk[entry, :, head],
        found.dv[entry, :, head],
    )
    return _distances(cut, _expected(shape, Inputs(q, k, v), upstream))


def _far(distances: list[float], limit: float, other: str) -> str:
    """Returns what is too far from the other; empty if nothing is."""
    for name, distance in zip(Results._fields, distances, strict=True):
        if not distance <= limit:
            return f"{name} off by {distance:.3g} from {other} (allowed: {limit:.3g})"
    return ""


def check(
    shape: WindowedShape, dtype: str, inputs: Inputs, do: Any, found: Results, theirs: Results | None
) -> Check:
    """Checks the results of forward and backward.

    Args:
        shape: What was computed.
        dtype: In which element type.
        inputs: From what.
        do: The gradient of the output.
        found: The results.
        theirs: torch's, if there are some.

    Returns:
        The largest distance from the float64 oracle (the last key/value head of the last batch entry, with all the
        query heads that share it), and what is wrong, if anything.
    """
    sizes = [do, *inputs]
    for name, one, like in zip(Results._fields, found, sizes, strict=True):
        if one.shape != like.shape or one.dtype != like.dtype:
            return Check(
                float("nan"),
                f"{name}: expected {tuple(like.shape)} {like.dtype}, got {tuple(one.shape)} {one.dtype}",
            )
    limit = _TOLERANCE[dtype]
    distances = _oracle_distances(shape, inputs, do, found)
    error = float(np.max(distances))
    if failure := _far(distances, limit, "the float64 oracle"):
        return Check(error, failure)
    for name, one in zip(Results._fields, found, strict=True):
        if not np.isfinite(to_float64(one)).all():
            return Check(error, f"NaN or infinity in {name}")
    if theirs is not None:
        expected = Results(*map(to_float64, theirs))
        return Check(error, _far(_distances(found, expected), 2 * limit, "torch"))
    return Check(error)
