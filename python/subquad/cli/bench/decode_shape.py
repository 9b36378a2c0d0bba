"""The named shapes of decoding: few queries against a cache of keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from subquad.cli.bench.shapes import (
    ITEM_BYTES,
    Shape,
    check_count,
    check_flag,
    check_floor,
    check_limit,
    check_torch_floor,
)

LAYOUTS = ("bhsd", "bshd")


@dataclass(frozen=True)
class DecodeShape(Shape):
    """A call that attends to a cache, with what it is required to reach.

    Attributes:
        queries: Query tokens of each sequence.
        keys: Keys of the longest sequence; follows from `lengths`.
        lengths: Tokens in the cache before the call, of each sequence; in the file one number may be for all.
        page_size: Tokens of a page; 0 for a contiguous cache.
        layout: Order of the cache's memory, `"bhsd"` or `"bshd"`.
        append: Whether the call appends as many new keys and values as it has queries.
        hot: Whether every call reads the same cache, however small.
        smoke: Whether it belongs to the quick check.
        floor: By level and dtype, the least percent of the read bandwidth of a plain sum.
        torch_floor: By dtype, the least ratio to torch.
        limit_us: Microseconds that it may take; 0 for no limit.
        against: Name of another shape that it is measured beside; empty for none.
        limit_ratio: What it may take as a multiple of that one's time; 0 for no limit.
    """

    queries: int = field(default=1, kw_only=True)
    keys: int = field(default=0, init=False)
    lengths: tuple[int, ...] = field(kw_only=True)
    page_size: int = 0
    layout: str = "bhsd"
    append: bool = False
    hot: bool = False
    smoke: bool = False
    floor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    torch_floor: Mapping[str, float] = field(default_factory=dict)
    limit_us: float = 0.0
    against: str = ""
    limit_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Fills in what follows from the lengths, and checks all.

        Raises:
            ValueError: A value is wrong, or some do not go together.
        """
        super().__post_init__()
        self._check_lengths()
        object.__setattr__(self, "keys", max(map(self.keys_of, range(self.batch))))
        check_count("page_size", self.page_size, least=0)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.page_size and self.layout != "bshd":
            raise ValueError("page_size needs layout bshd")
        for name in ("append", "hot", "smoke"):
            check_flag(name, getattr(self, name))
        self._check_requirements()

    def _check_lengths(self) -> None:
        lengths: Any = self.lengths
        if type(lengths) is int:
            lengths = (lengths,) * self.batch
        if (
            not isinstance(lengths, tuple)
            or len(lengths) != self.batch
            or not all(type(length) is int and length >= 1 for length in lengths)
        ):
            shown = list(self.lengths) if isinstance(self.lengths, tuple) else self.lengths
            raise ValueError(
                "lengths must be a whole number of at least 1, or a list of one for each sequence of the "
                f"batch ({self.batch}), got {shown!r}"
            )
        object.__setattr__(self, "lengths", lengths)

    def _check_requirements(self) -> None:
        check_floor(self.floor, self.dtypes)
        check_torch_floor(self.torch_floor, self.dtypes)
        check_limit("limit_us", self.limit_us)
        check_limit("limit_ratio", self.limit_ratio)
        if not isinstance(self.against, str) or self.against == self.name:
            raise ValueError(f"against must be the name of another shape, got {self.against!r}")
        if self.limit_ratio and not self.against:
            raise ValueError("limit_ratio needs against")

    def keys_of(self, entry: int) -> int:
        """Returns the number of keys that a sequence attends to: those in the cache, and those appended."""
        return self.lengths[entry] + (self.queries if self.append else 0)

    def read_bytes(self, dtype: str) -> int:
        """Returns the bytes of all keys and values that one call attends to, each counted once."""
        tokens = sum(map(self.keys_of, range(self.batch)))
        return tokens * self.kv_heads * (self.head_dim + self.head_dim_v) * ITEM_BYTES[dtype]
