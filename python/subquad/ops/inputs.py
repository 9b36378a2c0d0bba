"""Arrays of one call, checked against each other before something is computed with them."""

from __future__ import annotations

from typing import Any

from .namespace import cast, dtype_name, namespace_of

_LIBRARIES = {"numpy": "a NumPy array", "torch": "a PyTorch tensor"}
_FLOATS = ("float32", "float64", "float16", "bfloat16")


class Inputs:
    """The first array of a call, and what it says of the others.

    Attributes:
        first: the array.
        name: what the caller calls it.
        xp: the module whose functions take it.
        sums: the dtype that sums are kept in, float64 if the array is float64 and float32 if not.
    """

    def __init__(self, name: str, array: Any, axes: str) -> None:
        """Checks the first array.

        Args:
            name: of the argument.
            array: the argument.
            axes: names of its axes, as `B, T, H, K`.

        Raises:
            ValueError: for another rank.
            TypeError: for objects that are no arrays, and dtypes that are not supported.
        """
        self.xp = namespace_of(name, array)
        self.first, self.name = array, name
        self._check_float(name, array)
        self._sums_name = "float64" if dtype_name(array) == "float64" else "float32"
        self.sums = getattr(self.xp, self._sums_name)
        if array.ndim != len(axes.split(", ")):
            raise ValueError(f"{name}: expected shape ({axes}), got {tuple(array.shape)}")

    def alike(self, name: str, array: Any, *shape: int | str) -> Any:
        """Returns an array of the first one's dtype.

        Args:
            name: of the argument.
            array: the argument.
            *shape: what its shape must be; a string names an axis of any length.

        Raises:
            ValueError: for another shape.
            TypeError: for objects that are no arrays, other libraries and dtypes.
        """
        self.check(name, array, *shape)
        if array.dtype != self.first.dtype:
            expected = f"{dtype_name(self.first)} as {self.name} has"
            raise TypeError(f"{name}: expected dtype {expected}, got {dtype_name(array)}")
        return array

    def beside(self, name: str, array: Any, *shape: int | str) -> Any:
        """Returns an array of the first one's dtype, or that of sums, as the latter; see `alike`."""
        self.check(name, array, *shape)
        names = sorted({dtype_name(self.first), self._sums_name})
        if dtype_name(array) not in names:
            raise TypeError(f"{name}: expected dtype {' or '.join(names)}, got {dtype_name(array)}")
        return cast(array, self.sums)

    def parameter(self, name: str, array: Any, *shape: int | str) -> Any:
        """Returns a parameter of a layer, of whatever float dtype, with that of sums; see `alike`."""
        self.check(name, array, *shape)
        self._check_float(name, array)
        return cast(array, self.sums)

    def check(self, name: str, array: Any, *shape: int | str) -> None:
        """Checks library and shape of an array of any dtype; see `alike`."""
        xp = namespace_of(name, array)
        if xp is not self.xp:
            expected, got = (_LIBRARIES.get(x.__name__, f"an array of {x.__name__}") for x in (self.xp, xp))
            raise TypeError(f"{name}: expected {expected} as {self.name} is, got {got}")
        found = tuple(array.shape)
        pairs = zip(shape, found, strict=False)
        if len(found) != len(shape) or any(not isinstance(n, str) and n != m for n, m in pairs):
            text = ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "")
            raise ValueError(f"{name}: expected shape ({text}), got {found}")

    @staticmethod
    def _check_float(name: str, array: Any) -> None:
        if dtype_name(array) not in _FLOATS:
            expected = "float32, float64, float16 or bfloat16"
            raise TypeError(f"{name}: expected dtype {expected}, got {dtype_name(array)}")


def state_pair(initial_state: Any, names: str) -> tuple[Any | None, Any | None]:
    """Returns the two states before the first token, either of which may be absent.

    Args:
        initial_state: a pair, or `None`: both are absent.
        names: of the two, for the message.

    Raises:
        TypeError: for what is no pair.
    """
    if initial_state is None:
        return None, None
    if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
        kind = type(initial_state).__name__
        raise TypeError(f"initial_state: expected a pair ({names}), got {kind}")
    first, second = initial_state
    return first, second


def check_chunk_size(chunk_size: int) -> None:
    """Raises `ValueError` for a chunk that has no tokens. Chunks are as long as suits the engine, whatever is given."""
    if not chunk_size > 0:
        raise ValueError(f"chunk_size: expected 1 or more, got {chunk_size}")
