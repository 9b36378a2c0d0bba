"""The contenders."""

import dataclasses

import pytest

import subquad
from subquad import _native
from subquad.cli.bench import contenders, tensors, verify
from subquad.cli.bench.mask_shape import MaskShape
from subquad.cli.bench.shapes import Shape
from subquad.cli.bench.timing import interleave


def test_torch_cannot_align_bottom_right():
    pytest.importorskip("torch")
    shape = Shape("a", 3, 8, ("float32",), keys=5, causal=True)
    inputs = tensors.make_inputs(shape, "float32", use_torch=True)
    assert contenders.sdpa_calls(shape, inputs) is None


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("keys", "causal"), [(3, True), (5, False)])
def test_both_sdpas_compute_the_same(heads, kv_heads, keys, causal):
    torch = pytest.importorskip("torch")
    shape = Shape("a", 3, 8, ("float32",), 2, heads, kv_heads, keys, 6, causal)
    inputs = tensors.make_inputs(shape, "float32", use_torch=True)
    calls = contenders.sdpa_calls(shape, inputs)
    assert calls is not None
    ours, theirs = (call() for call in calls)
    assert ours.shape == (2, heads, 3, 6)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours.transpose(1, 2), contenders.ours_call(shape, inputs)())


@pytest.mark.parametrize(("queries", "causal"), [(5, True), (3, True), (3, False)])
def test_a_mask_takes_the_place_of_causal(queries, causal):
    torch = pytest.importorskip("torch")
    shape = Shape("a", queries, 8, ("float32",), 2, 4, 2, 5, 6, causal)
    inputs = tensors.make_inputs(shape, "float32", use_torch=True)
    mask = torch.arange(5)[None] < 3
    calls = contenders.sdpa_calls(shape, inputs, mask)
    assert calls is not None
    q, k, v = inputs
    want = subquad.attention(q, k[:, :3], v[:, :3]).transpose(1, 2)
    for call in calls:
        torch.testing.assert_close(call(), want)


@pytest.mark.parametrize("use_torch", [False, True])
def test_options_of_a_shape_are_passed_on(use_torch):
    if use_torch:
        pytest.importorskip("torch")
    shape = MaskShape("a", head_dim=8, dtypes=("float32",), queries=9, heads=2, causal=True, window=3)
    shape = dataclasses.replace(shape, modifiers={"softcap": 0, "alibi": 0, "sinks": 0})
    inputs = tensors.make_inputs(shape, "float32", use_torch=use_torch)
    out = contenders.ours_call(shape, inputs)()
    assert verify.check(shape, "float32", inputs, out, None).failure == ""
    bare = contenders.ours_call(shape.plain()[0], inputs)()
    assert verify.check(shape, "float32", inputs, bare, None).failure != ""


def test_a_slow_contender_is_one_call_of_the_first_round(keep_threads):
    calls = []
    field = [
        contenders.attention("slow", lambda: calls.append(None), 1, use_torch=False, is_slow=True),
        contenders.attention("other", lambda: None, 1, use_torch=False),
    ]
    samples = interleave(field, repeat=2, time_budget=1.0)
    assert (len(calls), len(samples["slow/1"]), len(samples["other/1"])) == (1, 1, 2)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "f32"), ("float16", "f32"), ("float64", "f64"), ("bfloat16", None)]
)
def test_kind_of_peak(dtype, kind):
    if kind is None:
        kind = "bf16" if _native.config()["level"] in ("avx512bf16", "amx") else "f32"
    assert contenders.peak_kind(dtype) == kind


def test_one_unlucky_probe_does_not_count(monkeypatch, keep_threads):
    rates = iter([4.7e11, 2.3e11, 4.6e11])
    monkeypatch.setattr(_native, "probe_peak", lambda *_: next(rates))
    assert contenders.peak("bf16", 1, use_torch=False).measure() == 4.6e11


def test_reading_is_probed_over_the_same_arrays(monkeypatch, keep_threads):
    asked = []
    rates = iter([3e10, 1e10, 2e10])
    monkeypatch.setattr(_native, "probe_read", lambda *arguments: asked.append(arguments) or next(rates))
    contender = contenders.read(("keys", "values"), 2, use_torch=False)
    assert (contender.name, contender.measure()) == ("read/2", 2e10)
    assert asked == [(["keys", "values"], 2)] * 3


def test_threads_of_both(keep_threads):
    torch = pytest.importorskip("torch")
    contenders.set_threads(1, use_torch=True)
    assert (subquad.get_num_threads(), torch.get_num_threads()) == (1, 1)
    contenders.peak("f32", 2, use_torch=True).prepare()
    assert (subquad.get_num_threads(), torch.get_num_threads()) == (2, 2)
    contenders.set_threads(1, use_torch=False)
    assert (subquad.get_num_threads(), torch.get_num_threads()) == (1, 2)
