"""The calls of forward and backward, and the check of what they give."""

import numpy as np
import pytest

import subquad
from subquad.cli.bench import backward_calls, gradient_check, tensors
from subquad.cli.bench.backward_calls import BackwardCalls
from subquad.cli.bench.backward_shape import BackwardShape
from subquad.cli.bench.gradient_check import Results
from subquad.cli.bench.tensors import Inputs
from subquad.reference import exact

pytestmark = pytest.mark.usefixtures("keep_threads")

KINDS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5},
    "dense": {"keys": 31},
    "append": {"causal": True, "keys": 31},
    "queries without a key": {"causal": True, "keys": 13},
}


def make_shape(kind: str, dtype: str = "float32", **changes) -> BackwardShape:
    sizes = {"head_dim": 8, "head_dim_v": 5, "batch": 2, "heads": 4, "kv_heads": 2}
    return BackwardShape("a", 24, dtypes=(dtype,), **{**sizes, **KINDS[kind], **changes})


def make(kind: str, dtype: str = "float32", *, use_torch: bool = False, **changes) -> BackwardCalls:
    return backward_calls.make(make_shape(kind, dtype, **changes), dtype, use_torch=use_torch)


def writable(results: Results) -> Results:
    return Results(*map(np.array, results))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(gradient_check, "_CHUNK", 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_right(use_torch, dtype, kind):
    if use_torch:
        pytest.importorskip("torch")
    elif tensors.numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")
    calls = make(kind, dtype, use_torch=use_torch)
    found = calls.check(dtype)
    assert found.failure == ""
    assert 0 <= found.error <= gradient_check._TOLERANCE[dtype]
    # Bottom-right alignment is not what torch's is_causal does.
    assert (calls.theirs is not None) == (use_torch and kind not in ("append", "queries without a key"))
    assert (calls.dense is not None) == (kind == "window")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_agrees_with_finite_differences(kind):
    calls = make(kind, "float64", batch=1, heads=2, kv_heads=1)
    q, k, v = (array[0] for array in calls.inputs)
    expected = gradient_check._expected(calls.shape, Inputs(q, k[:, 0], v[:, 0]), calls.do[0])
    gradients = {"q": expected.dq, "k": expected.dk[:, None], "v": expected.dv[:, None]}

    def loss(**changed: np.ndarray) -> float:
        arrays = {"q": q, "k": k, "v": v, **changed}
        out = exact.attention(*(array[None] for array in arrays.values()), **calls.shape.options())
        return float((out * calls.do).sum())

    generator, step = np.random.default_rng(0), 1e-6
    for name, array in {"q": q, "k": k, "v": v}.items():
        direction = generator.standard_normal(array.shape)
        rise = loss(**{name: array + step * direction}) - loss(**{name: array - step * direction})
        assert rise / (2 * step) == pytest.approx(float((gradients[name] * direction).sum()), rel=1e-6)
    out = exact.attention(q[None], k[None], v[None], **calls.shape.options())
    np.testing.assert_allclose(expected.out, out[0], atol=1e-14)


# The last head of the last sequence, which the oracle looks at.
@pytest.mark.parametrize("name", Results._fields)
@pytest.mark.parametrize("token", [0, 12, 23])
@pytest.mark.parametrize("change", [1e-4, np.nan])
def test_one_wrong_element(name, token, change):
    calls = make("window")
    found = writable(calls.ours())
    getattr(found, name)[1, token, -1, 2] += change
    verdict = gradient_check.check(calls.shape, "float32", calls.inputs, calls.do, found, None)
    assert verdict.failure.startswith(f"{name} off by ")
    assert "from the float64 oracle" in verdict.failure
    assert not verdict.error <= 2e-5


@pytest.mark.parametrize("name", Results._fields)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_a_number_where_the_oracle_does_not_look(name, value):
    calls = make("causal")
    found = writable(calls.ours())
    getattr(found, name)[0, 10, 0, 0] = value
    verdict = gradient_check.check(calls.shape, "float32", calls.inputs, calls.do, found, None)
    assert verdict.failure == f"NaN or infinity in {name}"


@pytest.mark.parametrize("kind", ["causal", "window"])
@pytest.mark.parametrize("name", Results._fields)
def test_any_element_against_torch(kind, name):
    pytest.importorskip("torch")
    calls = make(kind, use_torch=True)
    found = calls.ours()
    getattr(found, name)[0, 10, 0, 0] += 1e-3
    verdict = calls._replace(ours=lambda: found).check("float32")
    assert verdict.failure.startswith(f"{name} off by ")
    assert "from torch" in verdict.failure


def test_another_shape_or_dtype():
    calls = make("causal")
    found = calls.ours()
    for wrong, message in (
        (found._replace(dk=found.dk[:, :-1]), "dk: expected (2, 24, 2, 8) float32, got (2, 23, 2, 8)"),
        (found._replace(dv=found.dv.astype(np.float64)), "dv: expected (2, 24, 2, 5) float32, got"),
    ):
        verdict = gradient_check.check(calls.shape, "float32", calls.inputs, calls.do, wrong, None)
        assert verdict.failure.startswith(message)
        assert np.isnan(verdict.error)


@pytest.mark.parametrize("which", ["attention", "attention_backward"])
def test_a_call_that_forgets_the_window(monkeypatch, which):
    function = getattr(subquad, which)

    def forget(*arguments, window_size=None, **options):
        return function(*arguments, **options)

    monkeypatch.setattr(subquad, which, forget)
    assert "from the float64 oracle" in make("window").check("float32").failure


def test_without_the_window_all_keys_are_seen():
    calls = make("window")
    assert calls.dense is not None
    plain = calls._replace(shape=make_shape("causal"), ours=calls.dense)
    assert plain.check("float32").failure == ""
    assert calls._replace(ours=calls.dense).check("float32").failure != ""


@pytest.mark.parametrize(("kind", "slow"), [("causal", False), ("window", True)])
def test_torchs_gradients_do_not_add_up(kind, slow):
    torch = pytest.importorskip("torch")
    calls = make(kind, use_torch=True)
    assert calls.theirs is not None
    assert calls.theirs_is_slow == slow
    first, second = calls.theirs(), calls.theirs()
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(tensor.requires_grad for tensor in (*calls.inputs, calls.do))


def test_the_gradient_of_the_output_is_no_input():
    shape = make_shape("causal", head_dim=5, kv_heads=4)
    inputs = tensors.make_inputs(shape, "float32", use_torch=False)
    do = tensors.make_output_gradient(shape, "float32", use_torch=False)
    assert do.shape == inputs.q.shape
    assert not np.array_equal(do, inputs.q)
