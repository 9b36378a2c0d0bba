"""The functions of an array's own library, for what is computed around a call of the extension."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_HALF = ("float16", "bfloat16")
_FLOATS = ("float32", "float64", *_HALF)
# Tokens that are worked on at a time.
_ROWS = 1024


def namespace_of(name: str, array: Any) -> Any:
    """Returns the module whose functions take an array: `torch`, `numpy`, or what the array says.

    Args:
        name: of the argument, for the message.
        array: the argument.

    Raises:
        TypeError: for objects that are no arrays.
    """
    # Nothing is an array of a library that nobody has imported.
    for library, kind in (("torch", "Tensor"), ("numpy", "ndarray")):
        module = sys.modules.get(library)
        if module is not None and isinstance(array, getattr(module, kind, ())):
            return module
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    raise TypeError(
        f"{name}: expected a PyTorch tensor, a NumPy array or another array with a namespace, "
        f"got {type(array).__name__}"
    )


def dtype_name(array: Any) -> str:
    """Returns the name of a dtype, which libraries share."""
    return str(array.dtype).removeprefix("torch.")


def cast(array: Any, dtype: Any) -> Any:
    """Returns an array with another dtype, which is one of its library's."""
    if array.dtype == dtype:
        return array
    return array.astype(dtype) if hasattr(array, "astype") else array.to(dtype)


def widened(name: str, array: Any) -> Any:
    """Returns an array as sums of it are kept: half types as float32, float32 and float64 as they are.

    Args:
        name: of the argument, for the message.
        array: the argument.

    Raises:
        TypeError: for other dtypes, and objects that are no arrays.
    """
    namespace = namespace_of(name, array)
    dtype = dtype_name(array)
    if dtype not in _FLOATS:
        raise TypeError(f"{name}: expected dtype float32, float64, float16 or bfloat16, got {dtype}")
    return cast(array, namespace.float32) if dtype in _HALF else array


def head_constants(q: Any, v: Any, constant: Callable[[int], float], *, name: str = "q") -> Any:
    """Returns a number for each head, `[H]`, of the library of `q`, float64 if that is and float32 if not.

    Args:
        q: `[B, T, H, K]`. Another rank is left to the extension to refuse.
        v: `[B, T, H, V]`.
        constant: computes the number of a head.
        name: what the caller calls `q`.

    Raises:
        ValueError: for values with more heads than `q` has.
        TypeError: for objects that are no arrays.
    """
    namespace = namespace_of(name, q)
    heads, value_heads = (x.shape[2] if getattr(x, "ndim", 0) == 4 else 0 for x in (q, v))
    if heads and value_heads and heads != value_heads:
        raise ValueError(f"v: expected {heads} heads as {name} has, got {value_heads}")
    dtype = namespace.float64 if dtype_name(q) == "float64" else namespace.float32
    # Beside the queries, whatever PyTorch's default device is.
    create = getattr(q, "new_tensor", namespace.asarray)
    return create([constant(head) for head in range(heads)], dtype=dtype)


def zeros(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns zeros beside an array: of its library, and on its device."""
    create = getattr(like, "new_zeros", namespace_of("like", like).zeros)
    return create(shape, dtype=dtype)


def contiguous(x: Any) -> Any:
    """Returns an array whose elements lie in order, and that keeps no more than them in memory."""
    return x.copy() if hasattr(x, "copy") else x.contiguous()


def backwards(name: str, x: Any, axis: int) -> Any:
    """Returns an array with one of its axes in the other order, and what has no such axis as it is.

    Args:
        name: of the argument, for the message.
        x: the argument.
        axis: the axis.

    Raises:
        TypeError: for objects that have axes but are no arrays.
    """
    if getattr(x, "ndim", 0) <= axis:
        return x
    return x.flip(axis) if hasattr(x, "flip") else namespace_of(name, x).flip(x, axis=axis)


def repeated_heads(x: Any, times: int, axis: int) -> Any:
    """Returns an array with each head so many times, one after the other."""
    if times == 1:
        return x
    shape = tuple(x.shape)
    wide = namespace_of("x", x).stack([x] * times, axis + 1)
    return wide.reshape((*shape[:axis], shape[axis] * times, *shape[axis + 1 :]))


def add_product(y: Any, one: Any, other: Any) -> Any:
    """Returns `y + one * other`, where `one` has the last two axes at most. Nobody else has `y`, which may be overwritten."""
    if hasattr(y, "addcmul_"):
        # Autograd may need what it was.
        return y.addcmul(one, other) if y.requires_grad else y.addcmul_(one, other)
    if namespace_of("y", y).__name__ != "numpy":
        return y + one * other
    # The product of all would be as much memory again.
    for first in range(0, y.shape[1], _ROWS):
        rows = slice(first, first + _ROWS)
        y[:, rows] += one * other[:, rows]
    return y
