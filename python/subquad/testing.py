"""What a right result is: one tolerance rule, and the naive formula that it measures against.

**The rule.** Let `error` be the largest of `|actual - expected|`, where `expected` is the float64 oracle of
`subquad.reference`, and `naive error` the largest of `|naive - expected|`, where `naive` is the textbook
formula evaluated in the dtype under test. Then

    error <= factor * naive error + floor

with `factor` 2, or 3 for gradients. The naive formula shows how much precision the dtype leaves on this very
input; a kernel may lose twice that and no more. The floor is for inputs on which the naive formula happens to
be exact: `FLOORS[dtype]`, in units of the dtype's spacing at the largest expected magnitude; gradients, whose
terms may cancel, have `gradient_floors`. Both maxima run over the finite places. Elsewhere there is no
tolerance: NaN answers NaN, an infinity the same infinity, and a finite value a finite value.

No environment variable and no option loosens the rule. A test whose inputs justify another floor passes it
and says why.

This module imports NumPy only; tensors of PyTorch and arrays of JAX are recognised by what they can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .reference.gradients import argument_gradients, score_gradients
from .reference.scores import Scores, by_head, scores_of, sink_logits, split_bias
from .reference.weights import weights_of

__all__ = [
    "FLOORS",
    "SPACING",
    "assert_close",
    "gradient_floors",
    "lse_floor",
    "naive_attention",
    "naive_attention_backward",
    "naive_scaled_dot_product_attention",
    "round_to",
]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

SPACING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next number, by dtype."""

FLOORS = {"float64": 4.0, "float32": 4.0, "float16": 1.0, "bfloat16": 1.0}
"""The floor in units of `SPACING[dtype] * max |expected|`.

Four units for the types that are also the accumulator's: the rounding of a score, of its exponential, of the
sum and of the quotient. One for the half types, whose only visible rounding is that of the result.
"""

_FACTOR = 2.0
_GRADIENT_FACTOR = 3.0


def _widen(array: Any) -> Float64:
    """Returns `array` as float64 without loss."""
    if hasattr(array, "detach"):
        # PyTorch has no NumPy view of its bfloat16.
        array = array.detach().double().cpu().numpy()
    return np.asarray(array).astype(np.float64)


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _mismatch(same: Bool, actual: Float64, expected: Float64, reason: str) -> str:
    index = tuple(int(i) for i in np.argwhere(~same)[0])
    count = int((~same).sum())
    return (
        f"{reason} at index {index}: actual {actual[index]!r}, expected {expected[index]!r} "
        f"({count} of {same.size} elements)"
    )


def assert_close(
    actual: Any,
    expected: Any,
    *,
    naive: Any,
    dtype: str | None = None,
    floor: float | None = None,
    gradient: bool = False,
    name: str = "result",
) -> None:
    """Checks a result against the float64 oracle, by the rule of this module.

    Args:
        actual: the result: a NumPy or JAX array or a PyTorch tensor.
        expected: the oracle's, of the same shape.
        naive: the naive formula's in the same dtype, of the same shape. Its error is the measure.
        dtype: `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`: what the computation was done in.
            Default: that of `actual`.
        floor: absolute error that is allowed in any case. Default:
            `FLOORS[dtype] * SPACING[dtype] * max |expected|`.
        gradient: whether the factor is that of gradients, 3 instead of 2.
        name: what the failure message calls the result.

    Raises:
        AssertionError: naming the index, both values, the error and the limit.
        ValueError: if the check would be vacuous: `naive` is of another shape or off by more than the floor
            and a quarter of the largest expected magnitude, or `floor` is no finite number from 0.
    """
    dtype = _dtype_name(actual) if dtype is None else dtype
    actual, expected, naive = _widen(actual), _widen(expected), _widen(naive)
    if naive.shape != expected.shape:
        raise ValueError(f"naive: expected shape {expected.shape} as expected has, got {naive.shape}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {expected.shape}, got {actual.shape}")
    both_finite = np.isfinite(actual) & np.isfinite(expected)
    same = both_finite | (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if not same.all():
        raise AssertionError(_mismatch(same, actual, expected, f"{name}: non-finite values differ"))
    finite = np.isfinite(expected)
    magnitude = float(np.max(np.abs(expected), where=finite, initial=0.0))
    if floor is None:
        floor = FLOORS[dtype] * SPACING[dtype] * magnitude
    if not 0.0 <= floor < np.inf:
        raise ValueError(f"floor: expected a finite number from 0, got {floor}")
    measured = finite & np.isfinite(naive)
    with np.errstate(invalid="ignore"):
        naive_error = float(np.max(np.abs(naive - expected), where=measured, initial=0.0))
        error = np.where(finite, np.abs(actual - expected), 0.0)
    if naive_error > max(magnitude / 4, floor):
        raise ValueError(
            f"naive: expected an approximation of expected, whose largest magnitude is {magnitude:.3e}, "
            f"got one that is off by {naive_error:.3e}"
        )
    factor = _GRADIENT_FACTOR if gradient else _FACTOR
    limit = factor * naive_error + floor
    if (error > limit).any():
        index = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
        raise AssertionError(
            f"{name}: error {error[index]:.3e} at index {index} exceeds the limit {limit:.3e}: "
            f"actual {actual[index]!r}, expected {expected[index]!r}; "
            f"limit = {factor:g} * naive error {naive_error:.3e} + floor {floor:.3e} ({dtype}); "
            f"{int((error > limit).sum())} of {error.size} elements exceed it"
        )


def lse_floor(expected: Any, dtype: str) -> float:
    """Returns the floor of a log-sum-exp, in absolute terms: its error is the relative error of the sum.

    Four roundings of the accumulator at `1 + max |expected|`; for float16 and bfloat16, whose exponentials
    are only as precise as their results need, a 64th of the dtype's spacing more.

    Args:
        expected: the oracle's log-sum-exp.
        dtype: the inputs': `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`.
    """
    expected = _widen(expected)
    magnitude = float(np.max(np.abs(expected), where=np.isfinite(expected), initial=0.0))
    return _weight_rounding(magnitude, dtype, roundings=4)


def _weight_rounding(magnitude: float, dtype: str, *, roundings: int) -> float:
    """The relative error of a weight whose logarithm is of that magnitude."""
    exponential = SPACING[dtype] / 64 if dtype in {"float16", "bfloat16"} else 0.0
    accumulator = SPACING["float64" if dtype == "float64" else "float32"]
    return roundings * accumulator * (1 + magnitude) + exponential


def round_to(array: Array, dtype: str) -> Array:
    """Rounds to the values of `dtype`, to nearest even.

    Args:
        array: float32 or float64; float32 for `"bfloat16"`.
        dtype: `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`.

    Returns:
        The rounded values, in `array`'s own dtype: NumPy has no bfloat16.
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return array.astype(dtype).astype(array.dtype)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    # The carry would turn a NaN with a full mantissa into an infinity.
    return np.where(np.isnan(array), array, rounded.view(np.float32)).astype(array.dtype).reshape(array.shape)


def _products(query: Array, key: Array) -> Array:
    """The products `[..., L, S]` of `[..., L, E]` and `[..., S, E]` in the accumulator's type, term by term.

    Sums in blocks, as BLAS forms them, are more precise than the naive formula and differ between builds.
    """
    stack = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    products = np.zeros((*stack, query.shape[-2], key.shape[-2]), dtype=query.dtype)
    for d in range(query.shape[-1]):
        products += query[..., d, None] * key[..., None, :, d]
    return products


def _sum(weights: Array, value: Array) -> tuple[Array, Array]:
    """The sum of values `[..., S, Ev]` under weights `[..., L, S]`, and that of the weights, term by term."""
    stack = np.broadcast_shapes(weights.shape[:-2], value.shape[:-2])
    total = np.zeros((*weights.shape[:-1], 1), dtype=weights.dtype)
    out = np.zeros((*stack, weights.shape[-2], value.shape[-1]), dtype=weights.dtype)
    for j in range(weights.shape[-1]):
        total += weights[..., j, None]
        out += weights[..., j, None] * value[..., None, j, :]
    return out, total


def _divided(out: Array, total: Array) -> Array:
    return out / np.where(total == 0, total.dtype.type(1), total)


def _softmax(scores: Array, visible: Bool, value: Array, sinks: Array | None = None) -> tuple[Array, Array]:
    """The formula on scores `[..., L, S]` and values `[..., S, Ev]`; sinks are `[..., L, 1]`."""
    zero = scores.dtype.type(0)
    scores = np.where(visible, scores, -np.inf).astype(scores.dtype)
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf).astype(scores.dtype)
    peak = peak if sinks is None else np.maximum(peak, sinks)
    base = np.where(np.isneginf(peak), zero, peak)
    out, total = _sum(np.exp(scores - base), value)
    total = total if sinks is None else total + np.exp(sinks - base)
    return _divided(out, total), (peak + np.log(total))[..., 0]


def _normalized(scores: Scores, value: Array, normalizer: Any) -> tuple[Array, Array]:
    """The same under a normalizer."""
    weights, is_divided = weights_of(scores.values, scores.visible, normalizer, scores.counts)
    out, total = _sum(weights, value)
    return _divided(out, total) if is_divided else out, np.log(total)[..., 0]


def _accumulator(array: Any, dtype: str) -> Array:
    return _widen(array).astype(np.float64 if dtype == "float64" else np.float32)


def naive_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    dtype: str,
    causal: bool = False,
    window_size: Any | None = None,
    mask: Any | None = None,
    scale: Any | None = None,
    bias: Any | None = None,
    relative_bias: Any | None = None,
    softcap: float | None = None,
    alibi_slopes: Any | None = None,
    sinks: Any | None = None,
    length_scale: Any | None = None,
    normalizer: Any | None = None,
) -> tuple[Array, Array]:
    """`subquad.attention` by the naive formula, in the arithmetic that `dtype` allows.

    Scores, softmax and sums are float32 for float32, float16 and bfloat16, and float64 for float64; sums
    run term by term; the output is rounded to `dtype`. NaN in hidden places does leak: give it inputs
    without.

    Args:
        q: `[B, Sq, H, D]`, with values of `dtype`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.
        dtype: `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`.
        causal: see `subquad.attention`, as for all that follow.
        window_size: one pair, or one for each head.
        mask: an object of `subquad.masks`.
        scale: a number, or what broadcasts to `[B, H, Sq]`. Default: `D ** -0.5`.
        bias: boolean (False hides) or added to the scores, broadcastable to `[B, H, Sq, Sk]`.
        relative_bias: `[H or 1, Sq + Sk - 1]`.
        softcap: a number above 0.
        alibi_slopes: `[H]` or `[B, H]`.
        sinks: `[H]`, or of rank 2 or 3 and broadcastable to `[B, H, Sq]`.
        length_scale: `[Sk + 1]`.
        normalizer: an object of `subquad.normalizers`.

    Returns:
        The output `[B, Sq, H, Dv]`, rounded to `dtype`, and the log-sum-exp `[B, H, Sq]`.
    """
    options = {
        "causal": causal,
        "window_size": window_size,
        "mask": mask,
        "scale": scale,
        "bias": bias,
        "relative_bias": relative_bias,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "length_scale": length_scale,
    }
    q, k, v = (_accumulator(x, dtype) for x in (q, k, v))
    v = by_head(v, q.shape[2])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scores = _scores(q, k, options)
        if normalizer is None:
            logits = (
                None if sinks is None else sink_logits(_widen(sinks), scores.values.shape[:3], q.dtype.type)
            )
            out, lse = _softmax(scores.values, scores.visible, v, logits)
        else:
            out, lse = _normalized(scores, v, normalizer)
    return np.moveaxis(round_to(out, dtype), 1, 2), lse


def _numbers(array: Any | None) -> Array | None:
    """Returns booleans as they are and numbers as float64."""
    is_boolean = array is not None and _dtype_name(array) == "bool"
    return None if array is None else np.asarray(array) if is_boolean else _widen(array)


def naive_attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    dtype: str,
    dlse: Any | None = None,
    wrt: Sequence[str] = ("q", "k", "v"),
    **options: Any,
) -> tuple[Array, ...]:
    """`subquad.attention_backward` by the naive formula, in the arithmetic that `dtype` allows.

    As `naive_attention`, whose result and log-sum-exp it starts from: weights and gradients of scores are float32 (float64 for
    float64), and rounded to `dtype` where they enter a matrix product.

    Args:
        do: `[B, Sq, H, Dv]`, with values of `dtype`.
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.
        dtype: `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`.
        dlse: `[B, H, Sq]`; `None` is 0.
        wrt: see `subquad.attention_backward`.
        **options: those of `naive_attention`.

    Returns:
        The gradients, in the order of `wrt`, each rounded to the dtype of its argument.
    """
    out, lse = naive_attention(q, k, v, dtype=dtype, **options)
    do, q, k, v = (_accumulator(x, dtype) for x in (do, q, k, v))
    dlse = np.zeros_like(lse) if dlse is None else _accumulator(dlse, dtype)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        gradients = _gradients(do, q, k, v, out, lse, dlse, dtype, options)
        rounded = []
        for name in wrt:
            own = _dtype_name(options[name]) if name in options else dtype
            rounded.append(round_to(gradients[name](), own))
    return tuple(rounded)


def _gradients(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array,
    dtype: str,
    options: Any,
    *,
    rounding: float | None = None,
) -> Any:
    """How to compute each gradient by the naive formula; or what it loses by weights with that relative error and `out` rounded."""
    heads, normalizer = q.shape[2], options.get("normalizer")
    scores = _scores(q, k, options)
    dot = do * out
    if rounding is not None:
        # With these signs nothing cancels in `do v^T - delta`.
        do, q, k = (np.abs(x) for x in (do, q, k))
        v, dlse, dot = (
            rounding * np.abs(v),
            rounding * np.abs(dlse),
            -(rounding + SPACING[dtype] / 2) * np.abs(dot),
        )
        scores = scores._replace(slopes=np.abs(scores.slopes))
    d_weights = _products(by_head(do, heads), by_head(v, heads))
    dot = np.moveaxis(dot.sum(axis=-1), 2, 1)
    found = score_gradients(scores, d_weights, dot, lse, dlse, normalizer)
    if rounding is not None:
        found = found._replace(weights=rounding * found.weights, d_scores=np.abs(found.d_scores))
    tables = {name: options.get(name) for name in ("bias", "relative_bias", "alibi_slopes", "sinks")}
    named = {name: _widen(table) for name, table in tables.items() if table is not None}

    def weigh(weights: Array, _visible: Bool, rows: Array) -> Array:
        return weights @ rows if rounding is not None else _sum(round_to(weights, dtype), rows)[0]

    return argument_gradients(found, scores, do, q, k, lse, named, weigh)


def _scores(q: Array, k: Array, options: Any) -> Scores:
    """The scores of queries and keys `[B, S, H, D]`, in their arithmetic."""
    numbers = {"scale", "bias", "relative_bias", "alibi_slopes", "length_scale"}
    scored: dict[str, Any] = {
        name: _numbers(given) if name in numbers and hasattr(given, "dtype") else given
        for name, given in options.items()
        if name not in {"sinks", "normalizer"}
    }
    return scores_of(_products(*(by_head(x, q.shape[2]) for x in (q, k))), q.shape[-1], **scored)


def gradient_floors(
    expected: Sequence[Array],
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dtype: str,
    dlse: Any | None = None,
    wrt: Sequence[str] = ("q", "k", "v"),
    **options: Any,
) -> list[float]:
    """Returns the floors of gradients, in absolute terms: a term is as precise as the logarithm of its weight.

    To the default floor comes what terms lose that cancel (the gradients of a query that sees one key are zero but for rounding):
    each weight one rounding of the accumulator at the largest score or log-sum-exp (for float16 and bfloat16 a 64th of the dtype's
    spacing more, as in `lse_floor`), and `out`, which `delta` is formed of, one rounding to the dtype.

    Args:
        expected: the oracle's gradients, in the order of `wrt`.
        do: `[B, Sq, H, Dv]`, without NaN, as all that follow.
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.
        out: the oracle's result, `[B, Sq, H, Dv]`.
        lse: the oracle's log-sum-exp, `[B, H, Sq]`.
        dtype: the inputs': `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`.
        dlse: `[B, H, Sq]`; `None` is 0.
        wrt: see `subquad.attention_backward`.
        **options: those of `naive_attention`.
    """
    do, q, k, v, out, lse = (_widen(x) for x in (do, q, k, v, out, lse))
    dlse = np.zeros(lse.shape) if dlse is None else _widen(dlse)
    scores = _scores(q, k, options)
    largest = max(
        float(np.max(np.abs(x), where=np.isfinite(x) & seen, initial=0.0))
        for x, seen in ((scores.values, scores.visible), (lse, np.True_))
    )
    unit = _weight_rounding(largest, dtype, roundings=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        losses = _gradients(do, q, k, v, out, lse, dlse, dtype, options, rounding=unit)
    floors = []
    for name, gradient in zip(wrt, expected, strict=True):
        own = _dtype_name(options[name]) if name in options else dtype
        finite = np.abs(np.where(np.isfinite(gradient), gradient, 0.0))
        default = FLOORS[own] * SPACING[own] * float(np.max(finite, initial=0.0))
        floors.append(default + float(np.max(np.abs(losses[name]()), initial=0.0)))
    return floors


def naive_scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any | None = None,
    *,
    dtype: str,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """`subquad.scaled_dot_product_attention` by the naive formula; see `naive_attention`.

    Args:
        query: `[..., H, L, E]`, with values of `dtype`.
        key: `[..., H, S, E]`.
        value: `[..., H, S, Ev]`.
        attn_mask: boolean (False hides) or added to the scaled scores, broadcastable to `[..., H, L, S]`.
        dtype: `"float64"`, `"float32"`, `"float16"` or `"bfloat16"`.
        is_causal: whether query `i` sees only keys `j <= i`.
        scale: factor of the scores. Default: `E ** -0.5`.
        enable_gqa: whether key and value may have fewer heads.

    Returns:
        `[..., H, L, Ev]`, rounded to `dtype`.
    """
    query, key, value = (_accumulator(x, dtype) for x in (query, key, value))
    if enable_gqa:
        key, value = (np.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    acc = query.dtype.type
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        scores = _products(query, key) * acc(scale)
        stack = np.broadcast_shapes(scores.shape[:-2], value.shape[:-2])
        scores = np.broadcast_to(scores, (*stack, *scores.shape[-2:]))
        added, visible = split_bias(_numbers(attn_mask), scores.shape, acc)
        if is_causal:
            visible = visible & np.tri(*scores.shape[-2:], dtype=np.bool_)
        return round_to(_softmax(scores + added, visible, value)[0], dtype)
