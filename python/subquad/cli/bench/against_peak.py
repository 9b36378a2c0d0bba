"""What benchmarks that are held against the machine's peak tell of a call."""

from dataclasses import dataclass

from subquad.cli.bench import requirements
from subquad.cli.bench.outcome import Value
from subquad.cli.bench.shapes import Shape
from subquad.cli.table import Column

COLUMNS = (
    Column("shape", text=True),
    Column("dtype", text=True),
    Column("threads"),
    Column("ms"),
    Column("GFLOP/s"),
    Column("peak"),
    Column("of peak"),
    Column("floor"),
)
FLOOR_NOTE = "floor: the least share of the peak that is accepted with two threads; ! is below it"


@dataclass(frozen=True, kw_only=True)
class AgainstPeak:
    """A shape and dtype at one thread count.

    Attributes:
        shape: The shape.
        dtype: Its element type.
        threads: The thread count.
        seconds: Median of one call.
        peak_flops: Median of the machine's peak, flops per second.
        peak_kind: What that peak is of: `"f32"`, `"f64"` or `"bf16"`.
        peak_share: Median of useful flops per second / peak, each pair from one round.
        torch_ratio: Median of torch's seconds / ours, each pair from one round; `None` without torch.
        floor: Least share that is asked for at this level and thread count, if any.
        error: Largest error of what was checked.
        failure: What is wrong with the result; empty if nothing.
    """

    shape: Shape
    dtype: str
    threads: int
    seconds: float
    peak_flops: float
    peak_kind: str
    peak_share: float
    torch_ratio: float | None
    floor: float | None
    error: float
    failure: str

    @property
    def case(self) -> str:
        """What was measured, in a line about a wrong result."""
        return f"{self.shape.name}/{self.dtype}, threads={self.threads}"

    @property
    def useful_rate(self) -> float:
        """Useful flops per second."""
        return self.shape.useful_flops / self.seconds

    def cells(self) -> tuple[str, ...]:
        """Returns the cells of `COLUMNS`."""
        return (
            self.shape.name,
            self.dtype,
            str(self.threads),
            f"{self.seconds * 1e3:.3f}",
            f"{self.useful_rate / 1e9:.0f}",
            f"{self.peak_flops / 1e9:.0f} {self.peak_kind}",
            requirements.at_least(f"{self.peak_share:.1%}", self.peak_share, self.floor),
            "-" if self.floor is None else f"{self.floor:.0%}",
        )

    def record(self) -> dict[str, Value]:
        """Returns the same as numbers, and the verdict."""
        return {
            "shape": self.shape.name,
            "dtype": self.dtype,
            "threads": self.threads,
            "seconds": self.seconds,
            "useful_flops": self.shape.useful_flops,
            "peak_flops": self.peak_flops,
            "peak_kind": self.peak_kind,
            "peak_share": self.peak_share,
            "torch_ratio": self.torch_ratio,
            "floor": self.floor,
            "error": self.error,
            "check": self.failure or "ok",
        }
