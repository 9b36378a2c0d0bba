"""The named shapes of the benchmarks: what each is made of, checked, with the count of useful work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from subquad.cli.arguments import MAX_THREADS

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
DTYPES = tuple(ITEM_BYTES)
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16", "amx")
_ALL = slice(None)


def _check_list(name: str, values: Any, is_valid: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(values, tuple) or not all(map(is_valid, values)) or len(set(values)) < len(values):
        shown = list(values) if isinstance(values, tuple) else values
        raise ValueError(f"{name} must be a list of {expected}, none of them twice, got {shown!r}")


def check_limit(name: str, value: Any) -> None:
    """Raises `ValueError` unless a value is a number that can be required."""
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises `ValueError` unless a value is a truth value."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises `ValueError` unless a value is a whole number, not below `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_floor(floor: Any, dtypes: tuple[str, ...]) -> None:
    """Raises `ValueError` unless a floor gives, for levels, a number for some of the dtypes."""
    if not isinstance(floor, Mapping) or not all(isinstance(floors, Mapping) for floors in floor.values()):
        raise ValueError("floor must give, for a level, a number for a dtype")
    unknown = set(floor) - set(LEVELS)
    unknown |= {dtype for floors in floor.values() for dtype in floors} - set(dtypes)
    if unknown:
        raise ValueError(f"floor names {', '.join(sorted(unknown))}, which is no level or not among dtypes")
    for floors in floor.values():
        for percent in floors.values():
            check_limit("floor", percent)


def check_torch_floor(floor: Any, dtypes: tuple[str, ...]) -> None:
    """Raises `ValueError` unless a floor gives a number for some of the dtypes."""
    if not isinstance(floor, Mapping) or set(floor) - set(dtypes):
        raise ValueError(f"torch_floor must give a number for some of dtypes, got {floor!r}")
    for ratio in floor.values():
        check_limit("torch_floor", ratio)


def check_case(name: Any, dtypes: Any, threads: Any) -> None:
    """Raises `ValueError` unless these can be the name, the element types and the thread counts of a shape."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be text, got {name!r}")
    _check_list("dtypes", dtypes, lambda dtype: dtype in DTYPES, f"some of {', '.join(DTYPES)}")
    if not dtypes:
        raise ValueError("dtypes must not be empty")
    _check_list(
        "threads",
        threads,
        lambda count: type(count) is int and 1 <= count <= MAX_THREADS,
        f"whole numbers from 1 to {MAX_THREADS}",
    )


class NamedShape(Protocol):
    """What all shapes have, whatever they are of: a dataclass with a name, element types and thread counts."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Unique in its table."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types to run it in."""

    @property
    def threads(self) -> tuple[int, ...]:
        """Thread counts to compare; empty for the one that the command was told."""


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
        check_case(self.name, self.dtypes, self.threads)
        for name, default in (("kv_heads", "heads"), ("keys", "queries"), ("head_dim_v", "head_dim")):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(self, default))
        for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "head_dim_v"):
            check_count(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        check_flag("causal", self.causal)

    def options(self, heads: slice = _ALL) -> dict[str, Any]:
        """Returns the keyword arguments that the call has beside its inputs, for all heads or some.

        Arrays are NumPy arrays.
        """
        return {"causal": self.causal}

    def keys_of(self, entry: int) -> int:
        """Returns the number of keys of a batch entry."""
        return self.keys

    def visible_pairs(self, entry: int) -> int:
        """Returns the pairs of a query and a key that it sees, for one head of a batch entry."""
        keys = self.keys_of(entry)
        if not self.causal:
            return self.queries * keys
        # Query i sees the keys up to i + keys - queries: an arithmetic series, clipped at no key and at every
        # key.
        seeing = min(self.queries, keys)
        return seeing * (2 * keys - seeing + 1) // 2

    @property
    def useful_flops(self) -> int:
        """Operations of the two products over the visible pairs; masked work and softmax do not count."""
        pairs = sum(map(self.visible_pairs, range(self.batch)))
        return 2 * self.heads * pairs * (self.head_dim + self.head_dim_v)


@dataclass(frozen=True)
class WindowedShape(Shape):
    """One call of attention that may have a window.

    Attributes:
        window: Keys that a query sees before itself; 0 for all.
    """

    window: int = 0

    def __post_init__(self) -> None:
        """Checks the window as well.

        Raises:
            ValueError: A value is wrong, or the window does not go with the rest.
        """
        super().__post_init__()
        check_count("window", self.window, least=0)
        if self.window and not (self.causal and self.queries == self.keys):
            raise ValueError("window needs causal, and as many keys as queries")

    def options(self, heads: slice = _ALL) -> dict[str, Any]:
        """Returns the keyword arguments that the call has beside its inputs, for all heads or some."""
        options = super().options(heads)
        if self.window:
            options["window_size"] = (self.window, 0)
        return options

    def visible_pairs(self, entry: int) -> int:
        """Returns the pairs of a query and a key that it sees, for one head of a batch entry."""
        beyond = max(self.queries - 1 - self.window, 0) if self.window else 0
        return super().visible_pairs(entry) - beyond * (beyond + 1) // 2


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
        check_flag("smoke", self.smoke)
        check_floor(self.floor, self.dtypes)


@dataclass(frozen=True)
class LatencyShape(Shape):
    """A small call.

    Attributes:
        limit_us: Microseconds that it may take; 0 for no limit.
    """

    limit_us: float = 0.0

    def __post_init__(self) -> None:
        """Checks the limit as well.

        Raises:
            ValueError: A value is wrong.
        """
        super().__post_init__()
        check_limit("limit_us", self.limit_us)


@dataclass(frozen=True)
class MemoryShape(Shape):
    """A long call.

    Attributes:
        limit_mib_per_thread: MiB that it may use beyond inputs and outputs for each thread; 0 for no limit.
    """

    limit_mib_per_thread: float = 0.0

    def __post_init__(self) -> None:
        """Checks the limit as well.

        Raises:
            ValueError: A value is wrong.
        """
        super().__post_init__()
        check_limit("limit_mib_per_thread", self.limit_mib_per_thread)
