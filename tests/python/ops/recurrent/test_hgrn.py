"""HGRN's recurrence, against its oracle."""

import numpy as np
import pytest
import torch

from subquad.ops import chunk_hgrn, fused_recurrent_hgrn
from subquad.reference import recurrent as oracles

from .cases import (
    DTYPES,
    HALF,
    accumulator,
    assert_largest_close,
    assert_mean_close,
    assert_same_bits,
    bounds_of,
    spans,
    wide,
)

FORMS = {"chunk": chunk_hgrn, "fused_recurrent": fused_recurrent_hgrn}
LENGTHS = {"some empty": (0, 5, 0, 64, 1, 33, 0), "all empty": (0, 0), "one": (40,), "none": ()}


def draw(tokens, dtype, *, batch=2, channels=37, gate=1.0, beside=None, seed=0):
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal
    x = normal((batch, tokens, channels)).astype(DTYPES[dtype])
    g = -gate * np.logaddexp(0.0, -3.0 * normal((batch, tokens, channels)))
    state = normal((batch, channels)).astype(DTYPES[accumulator(dtype)])
    return x, g.astype(DTYPES[beside or dtype]), state


def check(found, expected, dtype):
    o, final = found
    assert str(o.dtype).removeprefix("torch.") == dtype
    if dtype in HALF:
        assert_mean_close(o, expected[0])
    else:
        assert_largest_close(o, expected[0], dtype, "o")
    assert str(final.dtype).removeprefix("torch.") == accumulator(dtype)
    assert_largest_close(final, expected[1], dtype, "final_state")


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(form, dtype, library, convert_all):
    for tokens in (0, 1, 63, 65, 100, 1000):
        x, g, state = draw(tokens, dtype)
        found = FORMS[form](*convert_all(library, (x, g, state)), True)
        assert isinstance(found[0], torch.Tensor) == (library == "torch")
        check(found, oracles.hgrn(wide(x), wide(g), wide(state)), dtype)
    o, final = FORMS[form](x, g)
    assert final is None
    expected = oracles.hgrn(wide(x), wide(g))[0]
    (assert_mean_close if dtype in HALF else lambda o, y: assert_largest_close(o, y, dtype, "o"))(o, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_gates_and_states_of_other_types(dtype):
    x, g, state = draw(100, dtype, beside="float32")
    check(chunk_hgrn(x, g, state, True), oracles.hgrn(wide(x), wide(g), wide(state)), dtype)
    state = state.astype(DTYPES[dtype])
    check(chunk_hgrn(x, g, state, True), oracles.hgrn(wide(x), wide(g), wide(state)), dtype)


@pytest.mark.parametrize("gate", [1e-6, 30.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weak_and_strong_gates(gate, dtype):
    x, g, state = draw(300, dtype, gate=gate)
    check(chunk_hgrn(x, g, state, True), oracles.hgrn(wide(x), wide(g), wide(state)), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gates_above_0_let_states_grow(dtype):
    x, g, state = draw(40, dtype)
    check(chunk_hgrn(x, -g / 8, state, True), oracles.hgrn(wide(x), wide(-g / 8), wide(state)), dtype)


def test_infinite_gates_forget():
    x, g, state = draw(20, "float32")
    g[:, 10] = -np.inf
    check(chunk_hgrn(x, g, state, True), oracles.hgrn(wide(x), wide(g), wide(state)), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_parts_are_the_whole(dtype):
    x, g, state = draw(100, dtype)
    expected = oracles.hgrn(wide(x), wide(g), wide(state))
    for cut in (0, 1, 63, 64, 100):
        first, middle = chunk_hgrn(x[:, :cut], g[:, :cut], state, True)
        second, final = chunk_hgrn(x[:, cut:], g[:, cut:], middle, True)
        check((np.concatenate([first, second], axis=1), final), expected, dtype)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_packed_sequences_are_separate_calls(lengths, kind):
    lengths = LENGTHS[lengths]
    x, g, _ = draw(sum(lengths), "float32", batch=1)
    states = np.random.default_rng(1).standard_normal((len(lengths), 37)).astype(np.float32)
    o, final = fused_recurrent_hgrn(x, g, states, True, bounds_of(lengths).astype(kind))
    assert o.shape == x.shape
    assert final.shape == states.shape
    for n, (start, stop) in enumerate(spans(lengths)):
        part = fused_recurrent_hgrn(x[:, start:stop], g[:, start:stop], states[n : n + 1], True)
        assert_same_bits((o[:, start:stop], (final[n : n + 1],)), (part[0], (part[1],)))


def formula(x, g, state):
    out = []
    for t in range(x.shape[1]):
        state = torch.exp(g[:, t]) * state + x[:, t]
        out.append(state)
    return torch.stack(out, dim=1), state


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    tensors = [torch.from_numpy(x).requires_grad_() for x in draw(7, "float64", channels=3)]
    assert torch.autograd.gradcheck(lambda x, g, h: FORMS[form](x, g, h, True), tensors)
    assert torch.autograd.gradcheck(lambda x, g: FORMS[form](x, g)[0], tensors[:2])


def test_gradcheck_of_packed_sequences():
    x, g, _ = (torch.from_numpy(x).requires_grad_() for x in draw(9, "float64", channels=3, batch=1))
    states = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([0, 4, 4, 5, 9])
    assert torch.autograd.gradcheck(
        lambda x, g, h: fused_recurrent_hgrn(x, g, h, True, starts), (x, g, states)
    )


@pytest.mark.parametrize("tokens", [1, 65, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients(tokens, dtype):
    kinds = [dtype, "float32", "float32"]
    arrays = draw(tokens, "float64")
    tensors = [
        torch.from_numpy(x).to(getattr(torch, kind)).requires_grad_()
        for x, kind in zip(arrays, kinds, strict=True)
    ]
    found = chunk_hgrn(*tensors, True)
    expected = formula(*(x.double() for x in tensors))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype) for x in found]
    got = torch.autograd.grad(found, tensors, weights)
    want = torch.autograd.grad(expected, tensors, [w.double() for w in weights])
    for x, y, tensor in zip(got, want, tensors, strict=True):
        assert x.dtype == tensor.dtype
        if dtype == "bfloat16":
            assert_mean_close(x, wide(y.double().numpy()))
        else:
            assert (x - y).abs().max() <= 1e-5 * y.abs().max()


def test_compiled_code_has_the_same_results():
    tensors = [torch.from_numpy(x).requires_grad_() for x in draw(70, "float32")]
    compiled = torch.compile(chunk_hgrn, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, chunk_hgrn):
        o, final = function(*tensors, True)
        results.append((o, final, *torch.autograd.grad(o.sum() + final.sum(), tensors)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_inputs_only(form):
    x, g, state = (torch.from_numpy(x).requires_grad_() for x in draw(70, "float32"))
    expected = FORMS[form](x.bfloat16(), g, state, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = FORMS[form](x, g, state, True)
        compiled = torch.compile(FORMS[form], backend="aot_eager", fullgraph=True)(x, g, state, True)
        with torch.no_grad():
            plain = FORMS[form](x, g, state, True)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    for one in (found, compiled, plain):
        assert all(map(torch.equal, one, expected))
    gradients = torch.autograd.grad(found[0].float().sum(), (x, g, state))
    assert all(x.dtype == torch.float32 for x in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_change_no_bits(dtype):
    x, g, state = draw(40, dtype)
    o, final = chunk_hgrn(x, g, state, True)

    def turned(x):
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def backwards(x):
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]

    for layout in (turned, backwards):
        other = chunk_hgrn(layout(x), layout(g), layout(state), True)
        assert_same_bits((o, (final,)), (other[0], (other[1],)))


@pytest.mark.parametrize("form", FORMS)
def test_bad_input(form):
    function = FORMS[form]
    x, g, state = draw(10, "float32")
    for wrong in (x[0], x[None], x[..., 0]):
        with pytest.raises(ValueError, match=r"^x: expected shape"):
            function(wrong, g)
    for wrong in (g[:, 1:], g[..., 1:], g[:1], g[0]):
        with pytest.raises(ValueError, match=r"^g: expected shape"):
            function(x, wrong)
    for wrong in (state[:1], state[:, 1:], state[0], state[:, None]):
        with pytest.raises(ValueError, match=r"^initial_state: expected shape"):
            function(x, g, wrong)
    for name, at in (("x", 0), ("g", 1), ("initial_state", 2)):
        for wrong in (3.0, object(), x.astype(np.int32), x.astype(np.complex64)):
            arguments = [x, g, state]
            arguments[at] = wrong
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
                function(*arguments)
    for name, arguments in (
        ("g", (x, torch.from_numpy(g))),
        ("initial_state", (x, g, torch.from_numpy(state))),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a NumPy array"):
            function(*arguments)
    for kind in ("float64", "bfloat16"):
        with pytest.raises(TypeError, match=r"^g: expected dtype float32"):
            function(x, g.astype(DTYPES[kind]))
    with pytest.raises(TypeError):
        function(x, None)


def test_wrong_starts():
    x, g, _ = draw(6, "float32", batch=1)
    for wrong in ([1, 6], [0, 4, 3, 6], [0, 5], [0, 7], [0, -1, 6], [], [[0, 6]]):
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected"):
            fused_recurrent_hgrn(x, g, cu_seqlens=np.array(wrong, np.int64))
    for wrong in (np.array([0.0, 6.0]), [0, 6], torch.tensor([0, 6]), 6):
        with pytest.raises(TypeError, match=r"^cu_seqlens: expected"):
            fused_recurrent_hgrn(x, g, cu_seqlens=wrong)
    x, g, _ = draw(6, "float32")
    with pytest.raises(ValueError, match=r"^x: expected shape \(1, 6, [0-9]+\), as cu_seqlens is given, got"):
        fused_recurrent_hgrn(x, g, cu_seqlens=np.array([0, 6]))
