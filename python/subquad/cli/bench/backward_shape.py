"""The named shapes of training: forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from subquad.cli.bench.shapes import ITEM_BYTES, WindowedShape, check_floor, check_limit, check_torch_floor


@dataclass(frozen=True)
class BackwardShape(WindowedShape):
    """A forward and a backward call, with what they are required to reach together.

    Attributes:
        floor: By level and dtype, the least useful share of the peak in percent.
        torch_floor: By dtype, the least ratio to torch.
        limit_ratio: With a window, the most that it may take as a multiple of the time of the same calls without,
            for as much useful work; 0 for no limit.
        limit_mib_per_thread: MiB that they may use for each thread beyond inputs, outputs, gradients and, where
            the dtype is half, a gradient of the queries in float32; 0 for no limit, and memory is not measured.
    """

    floor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    torch_floor: Mapping[str, float] = field(default_factory=dict)
    limit_ratio: float = 0.0
    limit_mib_per_thread: float = 0.0

    def __post_init__(self) -> None:
        """Checks what is required as well.

        Raises:
            ValueError: A value is wrong, or some do not go together.
        """
        super().__post_init__()
        check_floor(self.floor, self.dtypes)
        check_torch_floor(self.torch_floor, self.dtypes)
        check_limit("limit_ratio", self.limit_ratio)
        check_limit("limit_mib_per_thread", self.limit_mib_per_thread)
        if self.limit_ratio and not self.window:
            raise ValueError("limit_ratio needs window")

    @property
    def useful_flops(self) -> int:
        """Operations over the visible pairs: two products forward; backward the scores anew, and four more."""
        pairs = sum(map(self.visible_pairs, range(self.batch)))
        return 2 * self.heads * pairs * (4 * self.head_dim + 3 * self.head_dim_v)

    @property
    def dense(self) -> BackwardShape | None:
        """The same without its window; `None` where it has none."""
        if not self.window:
            return None
        return replace(self, name=f"{self.name} without", window=0, limit_ratio=0.0)

    def memory_limit(self, dtype: str, threads: int) -> float | None:
        """Returns the bytes that the calls may use; `None` for no limit."""
        if not self.limit_mib_per_thread:
            return None
        is_half = ITEM_BYTES[dtype] == 2
        gradient = self.batch * self.queries * self.heads * self.head_dim * ITEM_BYTES["float32"]
        return self.limit_mib_per_thread * 2**20 * threads + (gradient if is_half else 0)
