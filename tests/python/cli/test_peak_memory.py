"""Peak memory of a block."""

import sys
import time

import numpy as np
import pytest

from subquad.cli import peak_memory as module
from subquad.cli.peak_memory import peak_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SIZE = 50 << 20
# Pages of code, the allocator and the kernel's counters.
SLACK = 8 << 20


def allocate() -> None:
    block = np.ones(SIZE, dtype=np.uint8)
    time.sleep(0.02)  # for the thread that samples
    del block


def test_what_was_freed_in_the_block_counts():
    with peak_memory() as peak:
        assert peak.bytes is None
        allocate()
    assert peak.bytes is not None
    assert SIZE - SLACK < peak.bytes < SIZE + SLACK
    assert peak.method in {"high-water mark", "sampled"}


def test_what_was_there_before_does_not_count():
    before = np.ones(SIZE, dtype=np.uint8)
    allocate()
    with peak_memory() as peak:
        pass
    assert before.nbytes == SIZE
    assert peak.bytes is not None
    assert peak.bytes < SLACK


def test_sampled_where_the_mark_cannot_be_reset(monkeypatch):
    monkeypatch.setattr(module, "_reset_high_water_mark", lambda: False)
    with peak_memory() as peak:
        allocate()
    assert peak.method == "sampled"
    assert peak.bytes is not None
    assert SIZE - SLACK < peak.bytes < SIZE + SLACK


def test_a_reset_that_is_refused_or_ignored(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CLEAR_REFS", tmp_path / "no" / "clear_refs")
    assert not module._reset_high_water_mark()
    monkeypatch.setattr(module, "_CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(module, "_status_bytes", {"VmHWM": 100 << 20, "VmRSS": 50 << 20}.__getitem__)
    assert not module._reset_high_water_mark()


def test_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_STATUS", tmp_path / "status")
    with peak_memory() as peak:
        allocate()
    assert (peak.bytes, peak.method) == (None, "unavailable")
    (tmp_path / "status").write_text("Name: python\n")
    with pytest.raises(OSError, match="no VmRSS"):
        module.resident_bytes()


@pytest.mark.parametrize("reset", [True, False])
def test_errors_pass_through(monkeypatch, reset):
    monkeypatch.setattr(module, "_reset_high_water_mark", lambda: reset)
    with pytest.raises(ZeroDivisionError), peak_memory() as peak:
        raise ZeroDivisionError
    assert peak.bytes is None
