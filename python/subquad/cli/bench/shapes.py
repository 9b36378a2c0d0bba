"""The named shapes of `shapes.toml`, parsed and checked, with the count of useful work."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from subquad.cli.errors import UserError

DTYPES = ("float32", "float64", "bfloat16", "float16")
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
DEFAULT_PATH = Path(__file__).with_name("shapes.toml")


@dataclass(frozen=True)
class Shape:
    """One call of attention.

    Attributes:
        name: Unique in its table.
        queries: Query length.
        head_dim: Width of queries and keys.
        dtypes: Element types to run it in.
        batch: Batch size.
        heads: Query heads.
        kv_heads: Key and value heads; 0 in the file for `heads`.
        keys: Key length; 0 in the file for `queries`.
        head_dim_v: Width of values; 0 in the file for `head_dim`.
        causal: Whether later keys are hidden, aligned bottom-right.
        threads: Thread counts to compare; empty for the one that the command was told.
    """

    name: str
    queries: int
    head_dim: int
    dtypes: tuple[str, ...]
    batch: int = 1
    heads: int = 1
    kv_heads: int = 0
    keys: int = 0
    head_dim_v: int = 0
    causal: bool = False
    threads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Fills in the sizes that follow from others, and checks all.

        Raises:
            ValueError: A size is wrong.
        """
        for name, default in (("kv_heads", "heads"), ("keys", "queries"), ("head_dim_v", "head_dim")):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(self, default))
        sizes = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "head_dim_v")
        for name, value in [(name, getattr(self, name)) for name in sizes] + [
            ("threads", n) for n in self.threads
        ]:
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise ValueError(f"dtypes must be some of {', '.join(DTYPES)}, got {list(self.dtypes)!r}")

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, for one head of one batch entry."""
        if not self.causal:
            return self.queries * self.keys
        # Query i sees the keys up to i + keys - queries: an arithmetic series, clipped at no key and at every
        # key.
        seeing = min(self.queries, self.keys)
        last = self.keys
        return seeing * (last + last - seeing + 1) // 2

    @property
    def useful_flops(self) -> int:
        """Operations of the two products over the visible pairs; masked work and softmax do not count."""
        return 2 * self.batch * self.heads * self.visible_pairs * (self.head_dim + self.head_dim_v)


@dataclass(frozen=True)
class ExactShape(Shape):
    """A prefill, with what it is required to reach.

    Attributes:
        floor: By level and dtype, the least useful share of the peak in percent.
        smoke: Whether it belongs to the quick check.
    """

    floor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    smoke: bool = False

    def __post_init__(self) -> None:
        """Checks the floors as well.

        Raises:
            ValueError: A size is wrong, or a floor names an unknown level or dtype.
        """
        super().__post_init__()
        unknown = set(self.floor) - set(LEVELS)
        unknown |= {dtype for floors in self.floor.values() for dtype in floors} - set(self.dtypes)
        if unknown:
            raise ValueError(
                f"floor names {', '.join(sorted(unknown))}, which is no level or not among dtypes"
            )


@dataclass(frozen=True)
class LatencyShape(Shape):
    """A small call.

    Attributes:
        limit_us: Microseconds that it may take; 0 for no limit.
    """

    limit_us: float = 0.0


@dataclass(frozen=True)
class MemoryShape(Shape):
    """A long call.

    Attributes:
        limit_mib_per_thread: MiB that it may use beyond inputs and outputs for each thread; 0 for no limit.
    """

    limit_mib_per_thread: float = 0.0


AnyShape = TypeVar("AnyShape", bound=Shape)
TABLES: dict[str, type[Shape]] = {"exact": ExactShape, "latency": LatencyShape, "memory": MemoryShape}


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
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from error


def build(kind: type[AnyShape], entry: dict[str, Any]) -> AnyShape:
    """Returns the shape that an entry describes.

    Args:
        kind: Its class.
        entry: Keys and values as TOML or JSON give them.

    Raises:
        ValueError: A key is unknown or missing, or a value is wrong.
    """
    known = {each.name for each in fields(kind)}
    if unknown := set(entry) - known:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    needed = {
        each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING
    }
    if missing := needed - set(entry):
        raise ValueError(f"missing key {', '.join(sorted(missing))}")
    arguments: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    return kind(**arguments)


def load(table: str, kind: type[AnyShape], path: Path = DEFAULT_PATH) -> tuple[AnyShape, ...]:
    """Reads one table of a file of shapes.

    Args:
        table: Its name.
        kind: The class of its entries.
        path: The file; by default the one of this package.

    Returns:
        The shapes in the file's order.

    Raises:
        UserError: The file cannot be read, or an entry is wrong (the message says which and why).
    """
    document = _parse(path)
    if unknown := set(document) - set(TABLES):
        raise UserError(f"{path}: unknown table {', '.join(sorted(unknown))}")
    shapes: list[AnyShape] = []
    for entry in document.get(table, []):
        try:
            shape = build(kind, entry)
            if any(shape.name == other.name for other in shapes):
                raise ValueError("the name is used twice")
        except (ValueError, TypeError) as error:
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
