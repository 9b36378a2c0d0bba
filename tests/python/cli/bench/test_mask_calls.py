"""The calls of masks: what they compute is right, what is wrong is found, and the plain ones do as much work."""

import numpy as np
import pytest

import subquad
from subquad.cli.bench import mask_calls, tensors
from subquad.cli.bench.mask_shape import MaskShape

pytestmark = pytest.mark.usefixtures("keep_threads")

KINDS = {
    "window": {"queries": 24, "causal": True, "window": 5},
    "modifiers": {
        "queries": 24,
        "causal": True,
        "window": 9,
        "modifiers": {"softcap": 1, "alibi": 1, "sinks": 1},
    },
    "padded": {"lengths": (3, 24, 11), "layout": "padded"},
    "padded, causal": {"lengths": (3, 24, 11), "layout": "padded", "causal": True},
    "packed": {"lengths": (3, 24, 11), "layout": "packed", "causal": True},
    "apart": {"lengths": (8, 24), "layout": "apart", "causal": True, "window": 5},
}


def make_shape(kind: str, dtype: str = "float32", **changes) -> MaskShape:
    sizes = {"head_dim": 8, "head_dim_v": 5, "dtypes": (dtype,), "heads": 4, "kv_heads": 2}
    return MaskShape("a", **{**sizes, **KINDS[kind], **changes})


@pytest.fixture
def break_results(monkeypatch):
    """Changes the results of subquad: `wrong` is given a copy of each."""

    def arrange(wrong) -> None:
        def replace(name):
            function = getattr(subquad, name)

            def call(*arguments, **options):
                out = np.array(function(*arguments, **options))
                wrong(out)
                return out

            monkeypatch.setattr(subquad, name, call)

        replace("attention")
        replace("attention_varlen")

    return arrange


@pytest.mark.parametrize("use_torch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_right(use_torch, dtype, kind):
    if use_torch:
        pytest.importorskip("torch")
    elif tensors.numpy_dtype(dtype) is None:
        pytest.skip("NumPy has no bfloat16 here")
    shape = make_shape(kind, dtype)
    made = mask_calls.make(shape, dtype, use_torch=use_torch)
    assert [call.shape.name for call in made.calls] == [each.name for each in shape.calls()]
    for call in made.calls:
        found = call.check(dtype)
        assert found.failure == ""
        assert found.error >= 0


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("window", (0, 0, 0, 0)),
        ("window", (0, 23, 3, 4)),
        ("modifiers", (0, 12, 1, 2)),
        ("padded", (0, 2, 0, 0)),
        ("padded", (1, 23, 3, 4)),
        ("padded", (2, 0, 0, 0)),
        ("apart", (0, 1, 3, 4)),
    ],
)
@pytest.mark.parametrize("change", [1e-4, np.nan])
def test_one_wrong_element(break_results, kind, place, change):
    def wrong(out):
        out[place] += change

    break_results(wrong)
    made = mask_calls.make(make_shape(kind), "float32", use_torch=False)
    for call in made.calls:
        assert "from the float64 oracle" in call.check("float32").failure


@pytest.mark.parametrize("token", [0, 3, 26, 27, 37])
def test_one_wrong_element_of_any_document(break_results, token):
    def wrong(out):
        out[token, 0, 0] = np.inf

    break_results(wrong)
    (call,) = mask_calls.make(make_shape("packed"), "float32", use_torch=False).calls
    assert call.check("float32").failure != ""


@pytest.mark.parametrize("value", [1e-30, np.nan])
def test_padding_must_be_zero(break_results, value):
    def wrong(out):
        out[0, 3, 0, 0] = value

    break_results(wrong)
    (call,) = mask_calls.make(make_shape("padded"), "float32", use_torch=False).calls
    assert call.check("float32").failure == "padding has a result that is not zero"


@pytest.mark.parametrize("kind", ["window", "modifiers"])
def test_a_call_that_is_not_what_it_says(monkeypatch, kind):
    attention = subquad.attention
    monkeypatch.setattr(subquad, "attention", lambda q, k, v, **_: attention(q, k, v, causal=True))
    for call in mask_calls.make(make_shape(kind), "float32", use_torch=False).calls:
        assert "from the float64 oracle" in call.check("float32").failure


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("window", [(24, ["causal"])]),
        ("modifiers", [(24, ["causal"])]),
        ("padded", [(3, ["causal"]), (24, ["causal"]), (11, ["causal"])]),
        ("packed", [(3, ["causal"]), (24, ["causal"]), (11, ["causal"])]),
    ],
)
def test_plain_calls(monkeypatch, kind, calls):
    given = []
    attention = subquad.attention

    def listen(q, k, v, **options):
        given.append((q.shape[1], list(options)))
        return attention(q, k, v, **options)

    monkeypatch.setattr(subquad, "attention", listen)
    made = mask_calls.make(make_shape(kind), "float32", use_torch=False)
    assert made.plain is not None
    made.plain()
    assert given == calls


def test_all_calls_are_on_the_same_memory():
    made = mask_calls.make(make_shape("apart"), "float32", use_torch=False)
    assert made.plain is None
    short, long = (call.inputs.k for call in made.calls)
    assert (short.shape[1], long.shape[1]) == (8, 24)
    assert np.shares_memory(short, long)


@pytest.mark.parametrize(("kind", "slow"), [("window", True), ("padded", False)])
def test_torch_computes_the_same(kind, slow):
    torch = pytest.importorskip("torch")
    shape = make_shape(kind, torch_floor={"float32": 2})
    (call,) = mask_calls.make(shape, "float32", use_torch=True).calls
    assert call.theirs is not None
    assert call.theirs_is_slow == slow
    ours, theirs = call.ours(), call.theirs().transpose(1, 2)
    for entry, length in enumerate(shape.lengths or (24,)):
        torch.testing.assert_close(ours[entry, :length], theirs[entry, :length])


def test_torch_takes_part_where_a_ratio_is_asked_for():
    pytest.importorskip("torch")
    shape = make_shape("window", dtypes=("float32", "float64"), torch_floor={"float32": 2})
    for dtype, takes_part in (("float32", True), ("float64", False)):
        (call,) = mask_calls.make(shape, dtype, use_torch=True).calls
        assert (call.theirs is not None) == takes_part
    (call,) = mask_calls.make(shape, "float32", use_torch=False).calls
    assert call.theirs is None


def test_any_element_against_torch(monkeypatch):
    pytest.importorskip("torch")
    (call,) = mask_calls.make(
        make_shape("padded", torch_floor={"float32": 2}), "float32", use_torch=True
    ).calls
    assert call.theirs is not None
    theirs = call.theirs().clone()
    theirs[0, 0, 3:] += 1  # what torch computes for padding does not matter
    assert call._replace(theirs=lambda: theirs).check("float32").failure == ""
    theirs[1, 3, 7, 4] += 1e-4
    assert "from torch" in call._replace(theirs=lambda: theirs).check("float32").failure
