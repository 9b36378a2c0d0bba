"""The benchmarks of the smallest call and of memory."""

from contextlib import nullcontext

import pytest

import subquad
from subquad.cli.bench import contenders, latency, memory, memory_child
from subquad.cli.bench.backward_shape import BackwardShape
from subquad.cli.bench.shapes import LatencyShape, MemoryShape
from subquad.cli.peak_memory import Peak

pytestmark = pytest.mark.usefixtures("keep_threads", "quick")

SMALL = LatencyShape("small", 4, 8, ("float32",), limit_us=1e6)
LONG = MemoryShape("long", 600, 8, ("float32",), causal=True, limit_mib_per_thread=100)


def test_calls_without_torch(make_settings, recorder):
    outcome = latency.run([(SMALL, "float32")], make_settings(), recorder)
    assert [row[2] for row in outcome.rows] == ["subquad.attention, NumPy"]
    assert outcome.rows[0][4:] == ("1e+06", "ok")
    assert outcome.failures == []
    assert recorder.details == ["small/float32"]


def test_calls_with_torch(make_settings, recorder):
    pytest.importorskip("torch")
    outcome = latency.run([(SMALL, "float32")], make_settings(use_torch=True), recorder)
    assert [row[2] for row in outcome.rows] == [
        "subquad.attention, NumPy",
        "subquad.attention, torch",
        "subquad.scaled_dot_product_attention, torch",
        "torch's own SDPA",
    ]
    assert [row[5] for row in outcome.rows] == ["ok", "ok", "ok", ""]  # the limit is ours
    assert [one["limit"] for one in outcome.records] == [1.0, 1.0, 1.0, None]
    assert all(0 < one["seconds"] < 1 for one in outcome.records)


def test_bottom_right_has_no_sdpa(make_settings, recorder):
    pytest.importorskip("torch")
    shape = LatencyShape("small", 2, 8, ("float32",), keys=4, causal=True)
    outcome = latency.run([(shape, "float32")], make_settings(use_torch=True), recorder)
    assert [row[2] for row in outcome.rows] == ["subquad.attention, NumPy", "subquad.attention, torch"]


def test_over_the_limit_and_no_limit(make_settings, recorder):
    shapes = [LatencyShape("a", 4, 8, ("float32",), limit_us=1e-3), LatencyShape("b", 4, 8, ("float32",))]
    outcome = latency.run([(shape, "float32") for shape in shapes], make_settings(), recorder)
    assert [row[4:] for row in outcome.rows] == [("0.001", "over"), ("-", "")]
    assert outcome.failures == []


def test_a_wrong_sdpa_is_caught(make_settings, recorder, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(subquad, "scaled_dot_product_attention", lambda q, *_, **__: torch.zeros_like(q))
    outcome = latency.run([(SMALL, "float32")], make_settings(use_torch=True), recorder)
    assert [row[5] for row in outcome.rows] == ["ok", "ok", "WRONG", ""]
    assert len(outcome.failures) == 1
    assert "small/float32, subquad.scaled_dot_product_attention, torch: off by" in outcome.failures[0]
    assert outcome.records[2]["check"] != "ok"


def test_memory(make_settings, recorder):
    outcome = memory.run([(LONG, "float32")], make_settings(), recorder)
    assert outcome.failures == []
    (row,), (one,) = outcome.rows, outcome.records
    assert row[:3] == ("long", "float32", "1")
    assert row[-1] == "ok"
    assert one["method"] in {"high-water mark", "sampled", "unavailable"}
    assert one["limit"] == 100 * 2**20
    assert recorder.stages == [("memory", 1)]


def test_memory_at_each_thread_count(child, make_settings, recorder):
    requests = child(3 << 20)
    shape = MemoryShape("long", 600, 8, ("float32",), threads=(1, 3), limit_mib_per_thread=2)
    outcome = memory.run([(shape, "float32")], make_settings(), recorder)
    assert [request["threads"] for request in requests] == [1, 3]
    assert [row[3:6] for row in outcome.rows] == [("3.00", "3.00", "2"), ("3.00", "1.00", "2")]
    assert [row[-1] for row in outcome.rows] == ["over", "ok"]
    assert outcome.failures == []


@pytest.mark.parametrize(
    ("dtype", "item", "lse_item"), [("float32", 4, 4), ("float16", 2, 4), ("float64", 8, 8)]
)
def test_memory_of_what_is_returned_does_not_count(monkeypatch, dtype, item, lse_item):
    shape = BackwardShape("a", 24, 8, (dtype,), heads=4, kv_heads=2, head_dim_v=6, causal=True)
    results = 24 * item * (4 * 6 + 4 * 8 + 2 * 8 + 2 * 6) + 24 * 4 * lse_item
    for used, expected in ((results + 5, 5), (results - 1, 0), (None, None)):
        peak = Peak(used, "sampled")
        monkeypatch.setattr(memory_child, "peak_memory", lambda peak=peak: nullcontext(peak))
        assert memory_child._backward(shape, dtype, 1) == (expected, "sampled", "")


def test_memory_unknown_and_without_limit(child, make_settings, recorder):
    child()
    outcome = memory.run([(MemoryShape("long", 600, 8, ("float32",)), "float32")], make_settings(), recorder)
    assert outcome.rows[0][3:] == ("-", "-", "-", "unavailable", "ok")
    assert outcome.records[0]["limit"] is None


@pytest.mark.parametrize(
    ("err", "failure"),
    [("Traceback ...\nMemoryError: no room\n", "MemoryError: no room"), ("", "exit status -9")],
)
def test_memory_of_a_process_that_fails(child, make_settings, recorder, err, failure):
    child(status=-9, err=err)
    outcome = memory.run([(LONG, "float32")], make_settings(), recorder)
    assert outcome.failures == [f"long/float32, threads=1: {failure}"]
    assert outcome.rows[0][-1] == "WRONG"


@pytest.mark.usefixtures("without_bfloat16")
def test_memory_leaves_bfloat16_out_where_numpy_has_none(make_settings, recorder):
    outcome = memory.run([(LONG, "bfloat16")], make_settings(), recorder)
    assert outcome.rows == []
    assert "bfloat16 was left out" in outcome.notes[0]


@pytest.mark.usefixtures("without_bfloat16")
def test_latency_leaves_numpys_bfloat16_out(make_settings, recorder):
    assert latency.run([(SMALL, "bfloat16")], make_settings(), recorder).rows == []
    assert contenders.peak_kind("float32") == "f32"
