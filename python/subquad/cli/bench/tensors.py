"""Inputs of the benchmarks, as torch tensors or NumPy arrays, and conversion to float64 for checking."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from subquad.cli.bench.shapes import Shape

_SEED = 20_240_501
_GRADIENT_SEED = 20_240_504


class Inputs(NamedTuple):
    """The arrays of one call, contiguous.

    Attributes:
        q: `[B, Sq, H, D]`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.
    """

    q: Any
    k: Any
    v: Any


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """Returns NumPy's dtype of that name; `None` for bfloat16 where ml_dtypes is not installed."""
    if name != "bfloat16":
        return np.dtype(name)
    if find_spec("ml_dtypes") is None:
        return None
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def rounded(array: npt.NDArray[Any], dtype: str, *, use_torch: bool) -> Any:
    """Returns an array, in the order of its memory, as one of another element type.

    Args:
        array: Its numbers.
        dtype: The name of that type.
        use_torch: Whether it is a torch tensor rather than a NumPy array.

    Raises:
        ValueError: NumPy has no such dtype here.
    """
    if use_torch:
        import torch

        return torch.from_numpy(array).to(getattr(torch, dtype))
    target = numpy_dtype(dtype)
    if target is None:
        raise ValueError("bfloat16 in NumPy needs ml_dtypes")
    return array.astype(target, copy=False)


def _standard_normal(
    sizes: Iterable[tuple[int, ...]], seed: int, dtype: str, *, use_torch: bool
) -> Iterable[Any]:
    generator = np.random.default_rng(seed)
    kind = np.float64 if dtype == "float64" else np.float32
    for size in sizes:
        yield rounded(generator.standard_normal(size, dtype=kind), dtype, use_torch=use_torch)


def make_inputs(shape: Shape, dtype: str, *, use_torch: bool) -> Inputs:
    """Returns standard normal inputs, the same in every run and for both kinds, rounded to `dtype`.

    Args:
        shape: Their sizes.
        dtype: Their element type.
        use_torch: Whether they are torch tensors rather than NumPy arrays.

    Raises:
        ValueError: NumPy has no such dtype here.
    """
    sizes = (
        (shape.batch, shape.queries, shape.heads, shape.head_dim),
        (shape.batch, shape.keys, shape.kv_heads, shape.head_dim),
        (shape.batch, shape.keys, shape.kv_heads, shape.head_dim_v),
    )
    return Inputs(*_standard_normal(sizes, _SEED, dtype, use_torch=use_torch))


def make_output_gradient(shape: Shape, dtype: str, *, use_torch: bool) -> Any:
    """Returns a standard normal gradient of the output, `[B, Sq, H, Dv]`; arguments as of `make_inputs`."""
    size = (shape.batch, shape.queries, shape.heads, shape.head_dim_v)
    (gradient,) = _standard_normal([size], _GRADIENT_SEED, dtype, use_torch=use_torch)
    return gradient


def full(size: tuple[int, ...], value: float, like: Any) -> Any:
    """Returns a contiguous array of one value, of the library and dtype of another."""
    return np.full(size, value, like.dtype) if isinstance(like, np.ndarray) else like.new_full(size, value)


def integers(values: npt.ArrayLike, like: Any) -> Any:
    """Returns an array of int32, of the library of another."""
    return in_library(np.array(values, np.int32), like)


def in_library(array: npt.NDArray[Any], like: Any) -> Any:
    """Returns an array as one of the library of another, with its own dtype."""
    if isinstance(like, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array)


def to_float64(array: Any) -> npt.NDArray[np.float64]:
    """Returns a copy of a tensor or array as a NumPy array of float64."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64)
    result: npt.NDArray[np.float64] = array.double().numpy()
    return result
