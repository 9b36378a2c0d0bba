"""Gates of delta rules, computed from what a model's layer gives: log decays, and how strongly is written.

They are computed in float32 (float64 for float64 inputs) by the functions of the array's own library.

Sources: Gated Delta Networks, Yang et al. 2024; Kimi Linear, Kimi Team 2025.
"""

from __future__ import annotations

from math import prod
from typing import Any

from .elementwise import exp, sigmoid, softplus
from .namespace import cast, namespace_of, widened


def fused_gdn_gate(g: Any, A_log: Any, dt_bias: Any | None = None, output_dtype: Any | None = None) -> Any:
    """Computes the log decay of the gated delta rule, `-exp(A_log) * softplus(g + dt_bias)`.

    Args:
        g: `[..., HV]`.
        A_log: `HV` numbers.
        dt_bias: `HV` numbers. `None`: 0.
        output_dtype: of the library of `g`. Default: float32, float64 for float64 inputs.

    Returns:
        `[..., HV]`, 0 or below.

    Raises:
        ValueError: for `A_log` or `dt_bias` with another number of elements.
        TypeError: for arguments that are no arrays of one library.
    """
    x = widened("g", g)
    heads = tuple(x.shape[-1:])
    if dt_bias is not None:
        x = x + _parameter("dt_bias", dt_bias, x, heads)
    rate = exp(_parameter("A_log", A_log, x, heads))
    return _rounded(-rate * softplus(x), output_dtype)


def fused_kda_gate(
    g: Any,
    A_log: Any | None = None,
    dt_bias: Any | None = None,
    lower_bound: float | None = None,
    output_dtype: Any | None = None,
) -> Any:
    """Computes the log decay of Kimi Delta Attention.

    It is `-exp(A_log) * softplus(g + dt_bias)`; with a lower bound `lower_bound * sigmoid(exp(A_log) * (g + dt_bias))`.

    Args:
        g: `[..., H, K]`.
        A_log: `H` numbers. `None`, with a lower bound only: 0.
        dt_bias: `H * K` numbers. `None`: 0.
        lower_bound: below 0, or `None`.
        output_dtype: of the library of `g`. Default: float32, float64 for float64 inputs.

    Returns:
        `[..., H, K]`, 0 or below.

    Raises:
        ValueError: for `A_log` or `dt_bias` with another number of elements, a bound that is not below 0, and for neither `A_log`
            nor a bound.
        TypeError: for arguments that are no arrays of one library.
    """
    x = widened("g", g)
    if x.ndim < 2:
        raise ValueError(f"g: expected shape (..., H, K), got {tuple(x.shape)}")
    if A_log is None and lower_bound is None:
        raise ValueError("A_log: expected an array, as there is no lower_bound, got None")
    check_lower_bound(lower_bound)
    if dt_bias is not None:
        x = x + _parameter("dt_bias", dt_bias, x, tuple(x.shape[-2:]))
    rate = 1.0 if A_log is None else exp(_parameter("A_log", A_log, x, (x.shape[-2], 1)))
    return _rounded(
        -rate * softplus(x) if lower_bound is None else lower_bound * sigmoid(rate * x), output_dtype
    )


def strengths(
    beta: Any | None, *, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False
) -> Any | None:
    """Returns how strongly delta rules write, as the engine takes it.

    Args:
        beta: `[B, T, HV]`, or `None`: 1.
        use_beta_sigmoid_in_kernel: whether `beta` is what a sigmoid is taken of.
        allow_neg_eigval: whether that sigmoid is doubled.

    Raises:
        ValueError: for `allow_neg_eigval` without a sigmoid, and a sigmoid without `beta`.
        NotImplementedError: for `[B, T, HV, V]`.
    """
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval: expected False, as use_beta_sigmoid_in_kernel is, got True")
    if beta is not None and getattr(beta, "ndim", 3) == 4:
        raise NotImplementedError(
            f"beta: shape {tuple(beta.shape)} is not supported; pass one number for each head, (B, T, HV)"
        )
    if not use_beta_sigmoid_in_kernel:
        return beta
    if beta is None:
        raise ValueError("beta: expected an array, as use_beta_sigmoid_in_kernel is set, got None")
    found = sigmoid(widened("beta", beta))
    return 2.0 * found if allow_neg_eigval else found


def check_lower_bound(lower_bound: float | None) -> None:
    """Raises `ValueError` for a bound of log decays that is not below 0."""
    if lower_bound is not None and not lower_bound < 0:
        raise ValueError(f"lower_bound: expected a number below 0, got {lower_bound}")


def _parameter(name: str, parameter: Any, like: Any, shape: tuple[int, ...]) -> Any:
    """Returns a parameter of a layer with the dtype of `like`, and that shape."""
    here, there = namespace_of(name, parameter), namespace_of("g", like)
    if here is not there:
        raise TypeError(f"{name}: expected an array of {there.__name__} as g is, got one of {here.__name__}")
    if prod(parameter.shape) != prod(shape):
        raise ValueError(f"{name}: expected {prod(shape)} elements, got shape {tuple(parameter.shape)}")
    return cast(parameter, like.dtype).reshape(shape)


def _rounded(gates: Any, dtype: Any | None) -> Any:
    return gates if dtype is None else cast(gates, dtype)
