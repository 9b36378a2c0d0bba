"""Activations of flash-linear-attention's layers, in PyTorch, with its signatures: computed wide and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .norms import projected, widened

# The signatures are flash-linear-attention's.
# ruff: noqa: FBT001, FBT002


def sigmoid(x: Tensor) -> Tensor:
    """Computes `1 / (1 + exp(-x))`."""
    return x.sigmoid()


def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes `log(sigmoid(x)) / temperature`."""
    return (functional.logsigmoid(widened(x)) / temperature).to(x.dtype)


def swish(x: Tensor) -> Tensor:
    """Computes `x * sigmoid(x)`."""
    return functional.silu(x)


def sqrelu(x: Tensor) -> Tensor:
    """Computes `max(x, 0) ** 2`."""
    return functional.relu(widened(x)).square().to(x.dtype)


def fast_gelu_impl(x: Tensor) -> Tensor:
    """Computes GELU with `tanh`."""
    return functional.gelu(x, approximate="tanh")


def bias_gelu_impl(x: Tensor, bias: Tensor) -> Tensor:
    """Computes GELU of `x + bias` with `tanh`."""
    return functional.gelu(widened(x) + widened(bias), approximate="tanh").to(x.dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """Computes `swish(x) * y`."""
    return (functional.silu(widened(x)) * widened(y)).to(x.dtype)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `linear(swiglu(x, y))`."""
    return projected(swiglu(x, y), weight, bias)


def sigmoidglu(x: Tensor, y: Tensor) -> Tensor:
    """Computes `sigmoid(x) * y`."""
    return (widened(x).sigmoid() * widened(y)).to(x.dtype)


def sigmoidglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `linear(sigmoidglu(x, y))`."""
    return projected(sigmoidglu(x, y), weight, bias)


def powglu(x: Tensor, y: Tensor, power: float = 3.0) -> Tensor:
    """Computes `x ** (power / (sqrt(x) + 1)) * sigmoid(x) * y` where `x` is positive, `x * sigmoid(x) * y` elsewhere."""
    wide = widened(x)
    positive = wide > 0
    # A base that has derivatives where the power is not taken.
    base = torch.where(positive, wide, 1.0)
    risen = torch.where(positive, base ** (power / (base.sqrt() + 1.0)), wide)
    return (risen * wide.sigmoid() * widened(y)).to(x.dtype)


def powglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, power: float = 3.0) -> Tensor:
    """Computes `linear(powglu(x, y, power))`."""
    return projected(powglu(x, y, power), weight, bias)


# Both directions of what layers take from a table when they are built: the functions above do not reach those built before.


def sigmoid_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    """Computes `sigmoid(x)`; contiguous, whatever is asked for."""
    del output_contiguous
    return sigmoid(x).contiguous()


def sigmoid_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    """Computes the gradient of `x` from that of `sigmoid(x)`."""
    del output_contiguous
    y = widened(x).sigmoid()
    return (widened(dy) * y * (1.0 - y)).to(x.dtype).contiguous()


def logsigmoid_fwd(x: Tensor, temperature: float = 1.0, output_contiguous: bool = False) -> Tensor:
    """Computes `logsigmoid(x, temperature)`; contiguous, whatever is asked for."""
    del output_contiguous
    return logsigmoid(x, temperature).contiguous()


def logsigmoid_bwd(
    x: Tensor, dy: Tensor, temperature: float = 1.0, output_contiguous: bool = False
) -> Tensor:
    """Computes the gradient of `x` from that of `logsigmoid(x, temperature)`."""
    del output_contiguous
    return (widened(dy) * (-widened(x)).sigmoid() / temperature).to(x.dtype).contiguous()


def swish_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    """Computes `swish(x)`; contiguous, whatever is asked for."""
    del output_contiguous
    return swish(x).contiguous()


def swish_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    """Computes the gradient of `x` from that of `swish(x)`."""
    del output_contiguous
    wide = widened(x)
    y = wide.sigmoid()
    return (widened(dy) * y * (1.0 + wide * (1.0 - y))).to(x.dtype).contiguous()
