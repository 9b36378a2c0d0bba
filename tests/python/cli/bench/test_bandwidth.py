"""The probes of copying and of updating."""

import numpy as np
import pytest

from subquad.cli.bench import bandwidth
from subquad.cli.bench.tensors import numpy_dtype, rounded


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "_PIECE", 8)
    monkeypatch.setattr(bandwidth, "_BYTES", 1000)


@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_memory_is_seen_in_its_own_order(use_torch, dtype, is_turned):
    if use_torch:
        pytest.importorskip("torch")
    elif numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")
    array = rounded(np.arange(30.0).reshape(2, 3, 5), dtype, use_torch=use_torch)
    turned = array.swapaxes(1, 2) if is_turned else array
    found = bandwidth.floats(turned)
    whole = array.numpy() if use_torch and dtype != "bfloat16" else None
    assert found.nbytes == 30 * (2 if dtype == "bfloat16" else array.itemsize) // 4 * 4
    if whole is not None:
        assert np.shares_memory(found, whole)
        np.testing.assert_array_equal(found.view(dtype), np.arange(30.0))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_everything_is_copied(monkeypatch, threads):
    moved = []
    copyto = np.copyto
    monkeypatch.setattr(
        np, "copyto", lambda target, source: moved.append(len(source)) or copyto(target, source)
    )
    probe = bandwidth.copy_rate(np.ones((3, 7), np.float32), threads)
    assert probe() > 0
    # 168 bytes are read and written in a round.
    assert sum(moved) == 21 * 6
    assert max(moved) == 8


@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_everything_is_updated_and_stays(monkeypatch, use_torch, dtype):
    if use_torch:
        pytest.importorskip("torch")
    numbers = np.array([[1.5, -0.0, np.inf], [np.nan, 1e-40, -3.0]])
    arrays = [rounded(numbers, dtype, use_torch=use_torch) for _ in range(3)]
    updated = []
    multiply = np.multiply
    monkeypatch.setattr(
        np, "multiply", lambda a, b, out: updated.append((a.size, out is a)) or multiply(a, b, out=out)
    )
    assert bandwidth.update_rate(arrays, 2)() > 0
    assert {size for size, _ in updated} == {6}
    assert all(in_place for _, in_place in updated)
    assert len(updated) % 3 == 0
    for array in arrays:
        np.testing.assert_array_equal(np.asarray(array), numbers.astype(dtype))


def test_bytes_that_are_read_and_written_count(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(bandwidth, "perf_counter", lambda: next(clock))
    # 84 bytes, six times, there and back, in two seconds.
    assert bandwidth.copy_rate(np.ones((3, 7), np.float32), 1)() == 84 * 2 * 6 / 2


def test_one_unlucky_probe_does_not_count(keep_threads):
    rates = iter([3e10, 1e10, 2e10])
    contender = bandwidth.contender(lambda: next(rates), 2, use_torch=False)
    assert (contender.name, contender.measure()) == ("peak/2", 2e10)
