"""Reading files of named shapes, and selecting from them.

The package has one file for each benchmark, in `named_shapes` (`benches/shapes` is a link to it, which must lie inside the Python
package to be part of the wheel). They are read by `subquad bench` and by every other benchmark of the project.
"""

import sys
from dataclasses import MISSING, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from subquad.cli.bench.backward_shape import BackwardShape
from subquad.cli.bench.decode_shape import DecodeShape
from subquad.cli.bench.mask_shape import MaskShape
from subquad.cli.bench.recurrent_shape import RecurrentShape
from subquad.cli.bench.shapes import ExactShape, LatencyShape, MemoryShape, NamedShape
from subquad.cli.errors import UserError

DEFAULT_PATH = Path(__file__).with_name("named_shapes")
AnyShape = TypeVar("AnyShape", bound=NamedShape)
TABLES: dict[str, type[NamedShape]] = {
    "exact": ExactShape,
    "decode": DecodeShape,
    "masks": MaskShape,
    "backward": BackwardShape,
    "recurrent": RecurrentShape,
    "latency": LatencyShape,
    "memory": MemoryShape,
}


def _parse(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise UserError(
                'subquad bench needs tomli, which is not installed: pip install "subquad[bench]"'
            ) from None
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not even UTF-8
        raise UserError(f"{path}: {error}") from error


def build(kind: type[AnyShape], entry: dict[str, Any]) -> AnyShape:
    """Returns the shape that an entry describes.

    Args:
        kind: Its class.
        entry: Keys and values as TOML or JSON give them.

    Raises:
        ValueError: A key is unknown or missing, or a value is wrong.
    """
    given = [each for each in fields(kind) if each.init]
    known = {each.name for each in given}
    if unknown := set(entry) - known:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    needed = {each.name for each in given if each.default is MISSING and each.default_factory is MISSING}
    if missing := needed - set(entry):
        raise ValueError(f"missing key {', '.join(sorted(missing))}")
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    return kind(**arguments)


def load(table: str, kind: type[AnyShape], path: Path = DEFAULT_PATH) -> tuple[AnyShape, ...]:
    """Reads one table of shapes.

    Args:
        table: Its name.
        kind: The class of its entries.
        path: The file that has it, or a directory with a file `<table>.toml`; by default the one of this package.

    Returns:
        The shapes in the file's order.

    Raises:
        UserError: The file cannot be read, or an entry is wrong (the message says which and why).
    """
    if path.is_dir():
        path /= f"{table}.toml"
    document = _parse(path)
    if unknown := set(document) - set(TABLES):
        raise UserError(f"{path}: unknown table {', '.join(sorted(unknown))}")
    entries = document.get(table, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: {table} must be an array of tables, [[{table}]]")
    shapes: list[AnyShape] = []
    for entry in entries:
        try:
            shape = build(kind, entry)
            if any(shape.name == other.name for other in shapes):
                raise ValueError("the name is used twice")
        except ValueError as error:
            raise UserError(f"{path}: {table} {entry.get('name', '(no name)')}: {error}") from error
        shapes.append(shape)
    return tuple(shapes)


def select(shapes: tuple[AnyShape, ...], pattern: str) -> list[tuple[AnyShape, str]]:
    """Returns the pairs of shape and dtype whose `name` or `name/dtype` matches a shell pattern."""
    return [
        (shape, dtype)
        for shape in shapes
        for dtype in shape.dtypes
        if fnmatchcase(shape.name, pattern) or fnmatchcase(f"{shape.name}/{dtype}", pattern)
    ]
