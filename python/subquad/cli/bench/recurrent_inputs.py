"""Inputs of recurrent operators: the same in every run and for both kinds of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from subquad.cli.bench import tensors
from subquad.cli.bench.recurrent_operators import Input
from subquad.cli.bench.recurrent_shape import RecurrentShape

Array = npt.NDArray[Any]

_SEED = 20_240_505
_GRADIENT_SEED = 20_240_506
# Later tokens repeat the earlier ones: numbers for 131,072 tokens would take longer to draw than to work through.
_PERIOD = 4096
_WEAK = 1e-4


def _sigmoid(array: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-array))
    return result


def _spread(low: float, high: float, generator: np.random.Generator, size: tuple[int, ...]) -> Array:
    """Returns numbers whose logarithms are spread evenly."""
    result: Array = np.exp(generator.uniform(np.log(low), np.log(high), size))
    return result


def _unit(generator: np.random.Generator, size: tuple[int, ...]) -> Array:
    rows = generator.standard_normal(size)
    result: Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return result


def _turn(generator: np.random.Generator, size: tuple[int, ...]) -> Array:
    phases = generator.uniform(-np.pi, np.pi, size)
    result: Array = generator.uniform(0.9, 0.999, size) * np.exp(1j * phases)
    return result


# How numbers are drawn, by what they are.
_DRAWS: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda generator, size: generator.standard_normal(size),
    # Rows of length 1.
    "unit": _unit,
    # Logarithms of decays.
    "decay": lambda generator, size: -_spread(1e-3, 1.0, generator, size),
    # What decays are the sigmoid of.
    "kept": lambda generator, size: 4.0 + generator.standard_normal(size),
    # Complex decays.
    "turn": _turn,
    "strength": lambda generator, size: _sigmoid(generator.standard_normal(size)),
    # Mamba's decays for each unit of time.
    "rate": lambda generator, size: -_spread(1.0, 16.0, generator, size),
    # What is added to steps of time before the softplus, which makes them small.
    "step bias": lambda generator, size: generator.standard_normal(size) - 4.0,
}
# Before the name of another input: rows that take away a part of its rows.
_PART_OF = "part of "


def _draw(
    draw: str, size: tuple[int, ...], generator: np.random.Generator, others: Mapping[str, Array]
) -> Array:
    """Returns numbers in float64.

    Args:
        draw: A key of `_DRAWS`, or `"part of <name>"`.
        size: Their shape.
        generator: Where they come from.
        others: The inputs that were drawn before.
    """
    if draw.startswith(_PART_OF):
        strengths = _DRAWS["strength"](generator, (*size[:-1], 1))
        part: Array = -strengths * others[draw.removeprefix(_PART_OF)]
        return part
    return _DRAWS[draw](generator, size)


def _periodic(shape: RecurrentShape, axes: str) -> tuple[tuple[int, ...], dict[int, int]]:
    """Returns the sizes of axes with no more tokens than are drawn, and the axes of tokens with their sizes."""
    sizes = shape.axes(axes)
    longer = {axis: size for axis, size in enumerate(sizes) if axes[axis] in "TU" and size > _PERIOD}
    return tuple(_PERIOD if axis in longer else size for axis, size in enumerate(sizes)), longer


def _dtype(one: Input, dtype: str) -> str:
    """Returns the name of an input's element type."""
    if one.draw == "turn":
        return "complex128" if dtype == "float64" else "complex64"
    return "float32" if one.wide and dtype in ("float16", "bfloat16") else dtype


def make(shape: RecurrentShape, dtype: str, *, use_torch: bool) -> dict[str, Any]:
    """Returns the inputs of the only call of a shape, by the names of its arguments.

    Args:
        shape: Their sizes.
        dtype: Their element type.
        use_torch: Whether they are torch tensors rather than NumPy arrays.

    Raises:
        ValueError: NumPy has no such dtype here.
    """
    generator = np.random.default_rng(_SEED)
    drawn: dict[str, Array] = {}
    inputs = {}
    for name, one in shape.kind.inputs.items():
        size, longer = _periodic(shape, one.axes)
        numbers = drawn[name] = _draw(one.draw, size, generator, drawn)
        if shape.form == "step" and one.draw == "decay":
            # The same step is made thousands of times: what it does not write must not fade to denormals.
            numbers *= _WEAK
        if dtype != "float64" and not np.iscomplexobj(numbers):
            numbers = numbers.astype(np.float32)
        for axis, length in longer.items():
            numbers = np.take(numbers, np.arange(length) % _PERIOD, axis)
        if shape.channels_last and one.axes == "BDT":
            numbers = np.ascontiguousarray(numbers.swapaxes(1, 2)).swapaxes(1, 2)
        inputs[name] = tensors.rounded(numbers, _dtype(one, dtype), use_torch=use_torch)
    return inputs


def make_output_gradient(shape: RecurrentShape, like: Any) -> Any:
    """Returns a standard normal gradient of the outputs `like`, a torch tensor."""
    import torch

    numbers = np.random.default_rng(_GRADIENT_SEED).standard_normal(shape.axes(shape.kind.out), np.float32)
    return torch.from_numpy(numbers).to(like.dtype)


def make_state(shape: RecurrentShape, dtype: str, like: Any) -> Any:
    """Returns a standard normal state, `[B, H, K, V]`, float32 (float64 for float64), of the library of `like`."""
    numbers = np.random.default_rng(_SEED).standard_normal(shape.axes("BHKV"))
    name = "float64" if dtype == "float64" else "float32"
    return tensors.rounded(numbers, name, use_torch=not isinstance(like, np.ndarray))


def exactly(array: Any) -> Array:
    """Returns a copy of a tensor or array as a NumPy array of float64, or complex128."""
    if "complex" not in str(array.dtype):
        return tensors.to_float64(array)
    numbers: Array = array if isinstance(array, np.ndarray) else array.numpy()
    return numbers.astype(np.complex128)
