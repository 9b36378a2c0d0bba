"""The named shapes of the benchmarks: what each is made of, checked, with the count of useful work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from subquad.cli.arguments import MAX_THREADS

DTYPES = ("float32", "float64", "bfloat16", "float16")
LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")


def _check_list(name: str, values: Any, is_valid: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(values, tuple) or not all(map(is_valid, values)) or len(set(values)) < len(values):
        shown = list(values) if isinstance(values, tuple) else values
        raise ValueError(f"{name} must be a list of {expected}, none of them twice, got {shown!r}")


def _check_limit(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


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
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be text, got {self.name!r}")
        for name, default in (("kv_heads", "heads"), ("keys", "queries"), ("head_dim_v", "head_dim")):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, getattr(self, default))
        for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "head_dim_v"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if type(self.causal) is not bool:
            raise ValueError(f"causal must be true or false, got {self.causal!r}")
        _check_list("dtypes", self.dtypes, lambda dtype: dtype in DTYPES, f"some of {', '.join(DTYPES)}")
        if not self.dtypes:
            raise ValueError("dtypes must not be empty")
        _check_list(
            "threads",
            self.threads,
            lambda count: type(count) is int and 1 <= count <= MAX_THREADS,
            f"whole numbers from 1 to {MAX_THREADS}",
        )

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, for one head of one batch entry."""
        if not self.causal:
            return self.queries * self.keys
        # Query i sees the keys up to i + keys - queries: an arithmetic series, clipped at no key and at every
        # key.
        seeing = min(self.queries, self.keys)
        return seeing * (2 * self.keys - seeing + 1) // 2

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
        if type(self.smoke) is not bool:
            raise ValueError(f"smoke must be true or false, got {self.smoke!r}")
        if not isinstance(self.floor, Mapping) or not all(
            isinstance(floors, Mapping) for floors in self.floor.values()
        ):
            raise ValueError("floor must give, for a level, a number for a dtype")
        unknown = set(self.floor) - set(LEVELS)
        unknown |= {dtype for floors in self.floor.values() for dtype in floors} - set(self.dtypes)
        if unknown:
            raise ValueError(
                f"floor names {', '.join(sorted(unknown))}, which is no level or not among dtypes"
            )
        for floors in self.floor.values():
            for percent in floors.values():
                _check_limit("floor", percent)


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
        _check_limit("limit_us", self.limit_us)


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
        _check_limit("limit_mib_per_thread", self.limit_mib_per_thread)
