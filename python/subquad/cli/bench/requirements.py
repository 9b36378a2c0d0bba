"""What the shapes are required to reach, and how a table marks what does not. Stated for two threads."""

from collections.abc import Mapping

_THREADS = 2


def limit(value: float | None, threads: int) -> float | None:
    """Returns a requirement of a shape; `None` if it has none (or 0) or if the thread count is another."""
    return value if value and threads == _THREADS else None


def share(floor: Mapping[str, Mapping[str, float]], dtype: str, threads: int, level: str) -> float | None:
    """Returns the least share that is asked for, between 0 and 1, from percents by level and dtype."""
    percent = floor.get(level, {}).get(dtype) if threads == _THREADS else None
    return None if percent is None else percent / 100


def at_least(text: str, value: float, least: float | None) -> str:
    """Returns a cell for a value, with `!` if it is below what is asked for."""
    return text if least is None else f"{text} " if value >= least else f"{text}!"


def ratio(value: float | None, least: float | None) -> tuple[str, str]:
    """Returns the cells of a ratio to torch, if there is one, and of the least that is asked for."""
    absent = "-"
    return (
        absent if value is None else at_least(f"{value:.2f}x", value, least),
        absent if least is None else f"{least:g}x",
    )


def at_most(text: str, value: float, most: float | None) -> str:
    """Returns a cell for a value, with `!` if it is above what is allowed."""
    return text if most is None else f"{text} " if value <= most else f"{text}!"
