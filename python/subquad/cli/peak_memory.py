"""Peak resident memory of this process over a stretch of code.

Linux keeps the high-water mark of a process (`VmHWM`) and lets it be reset by writing 5 to
`/proc/self/clear_refs`: exact, and free while the code runs. Where the reset is refused (some sandboxes), a
thread samples the resident size instead.
"""

import ctypes
import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002
# After a reset the mark equals the resident size but for the kernel's per-CPU counting slack.
_RESET_SLACK_BYTES = 4 << 20


@dataclass
class Peak:
    """What a measurement found.

    Attributes:
        bytes: Peak resident size above the size at the start; `None` until the block ends, or where it cannot
            be known.
        method: `"high-water mark"`, `"sampled"` or `"unavailable"`.
    """

    bytes: int | None = None
    method: str = "unavailable"


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


def resident_bytes() -> int:
    """Returns the resident size of this process.

    Raises:
        OSError: The system does not tell.
    """
    return _status_bytes("VmRSS")


def release_free_memory() -> None:
    """Gives freed memory back to the system, where it would hide what a later run uses."""
    gc.collect()
    # Where the C library is another, the start is a little high and the peak above it a little low.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
        return _status_bytes("VmHWM") <= resident_bytes() + _RESET_SLACK_BYTES
    except OSError:
        return False


@contextmanager
def _sampler() -> Generator[list[int]]:
    highest = [resident_bytes()]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            highest[0] = max(highest[0], resident_bytes())

    thread = threading.Thread(target=sample, name="subquad-memory", daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        stop.set()
        thread.join()


@contextmanager
def peak_memory() -> Generator[Peak]:
    """Measures the peak resident memory of the block above what was resident when it began.

    Yields:
        A `Peak` that is filled in when the block ends without an exception.
    """
    peak = Peak()
    release_free_memory()
    try:
        start = resident_bytes()
    except OSError:
        yield peak
        return
    if _reset_high_water_mark():
        yield peak
        peak.method, highest = "high-water mark", _status_bytes("VmHWM")
    else:
        with _sampler() as samples:
            yield peak
        peak.method, highest = "sampled", samples[0]
    peak.bytes = max(0, highest - start)
