"""Probes of what memory gives to work that writes as much as it reads, in bytes read and written per second.

NumPy moves pieces of the memory that the measured calls work on, in as many threads as they have. Each thread goes over its
share until all have moved enough for their start not to count.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from threading import Barrier
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from subquad.cli.bench.contenders import set_threads
from subquad.cli.bench.timing import Contender

Floats = npt.NDArray[np.float32]

# A piece is moved without holding Python's lock, and is large enough for that to count.
_PIECE = 1 << 18
_BYTES = 256 << 20
_PROBES = 3


def floats(array: Any) -> Floats:
    """Returns the memory of a tensor or array, which has no gaps, as numbers of four bytes; without the rest, if there is one."""
    if isinstance(array, np.ndarray):
        memory = np.ravel(array, order="K").view(np.uint8)
    else:
        import torch

        flat = array.as_strided((array.numel(),), (1,), array.storage_offset())
        memory = flat.view(torch.uint8).numpy()
    result: Floats = memory[: memory.size // 4 * 4].view(np.float32)
    return result


def _rate(pieces: Sequence[Any], threads: int, move: Callable[[Any], object], size: int) -> float:
    """Returns the bytes per second at which `threads` threads read and write pieces, of `size` bytes together, some times."""
    rounds = max(1, -(-_BYTES // (2 * size)))

    # Every thread takes one share, and all begin together.
    barrier = Barrier(threads)

    def work(first: int) -> tuple[float, float]:
        barrier.wait()
        begin = perf_counter()
        for _ in range(rounds):
            for piece in pieces[first::threads]:
                move(piece)
        return begin, perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        spans = list(pool.map(work, range(threads)))
    begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
    return 2 * size * rounds / (end - begin)


def _pieces(memory: Floats) -> list[Floats]:
    return [memory[start : start + _PIECE] for start in range(0, len(memory), _PIECE)]


def copy_rate(array: Any, threads: int) -> Callable[[], float]:
    """Returns a probe that copies the memory of `array` to other memory of that size."""
    source = floats(array)
    target = np.zeros_like(source)
    pairs = list(zip(_pieces(source), _pieces(target), strict=True))
    return lambda: _rate(pairs, threads, lambda pair: np.copyto(pair[1], pair[0]), source.nbytes)


def update_rate(arrays: Sequence[Any], threads: int) -> Callable[[], float]:
    """Returns a probe that reads and writes float32 or float64 `arrays` in place; their numbers stay what they are."""
    memory = [array if isinstance(array, np.ndarray) else array.numpy() for array in arrays]
    pieces = [piece for array in memory for piece in _pieces(array.reshape(-1))]
    size = sum(array.nbytes for array in memory)
    return lambda: _rate(
        pieces, threads, lambda piece: np.multiply(piece, piece.dtype.type(1), out=piece), size
    )


def contender(probe: Callable[[], float], threads: int, *, use_torch: bool) -> Contender:
    """Returns the contender of a probe, the median of a few."""
    return Contender(
        f"peak/{threads}",
        lambda: median(probe() for _ in range(_PROBES)),
        lambda: set_threads(threads, use_torch=use_torch),
    )
