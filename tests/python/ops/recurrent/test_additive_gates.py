"""Gates of weighted averages, and the order of LightNet's states."""

import ml_dtypes
import numpy as np
import pytest
import torch

from subquad import ops
from subquad.reference import recurrent as oracles

from .cases import DTYPES, HALF, Sizes, assert_same_bits, bounds_of, spans
from .composed import check_found, draw_inputs, draw_states, expect, problem

LENGTHS = (4, 0, 1, 60)


def averaged(x, before):
    """Weights, log decays and the last sum of one sequence, `[T, H, K]` and `[1, H, K]`, in float64."""
    z = np.logaddexp.accumulate(np.concatenate([before, x]), axis=0)
    first, last = z[:-1], z[1:]
    return np.exp(x - last), np.where(np.isneginf(first), 0.0, first - last), z[-1:]


def drawn(dtype, rows, tokens):
    generator = np.random.default_rng(1)
    x = (4.0 * generator.standard_normal((rows, tokens, 2, 5))).astype(DTYPES[dtype])
    before = generator.standard_normal((rows if rows > 1 else len(LENGTHS), 1, 2, 5))
    # One that nothing is known of.
    before[1, 0, 0] = -np.inf
    return x, before.astype(DTYPES["float64" if dtype == "float64" else "float32"])


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_gates(dtype, packed, has_state, library, convert):
    x, before = drawn(dtype, *((1, sum(LENGTHS)) if packed else (3, 65)))
    precise = before.astype(np.float64) if has_state else np.full(before.shape, -np.inf)
    rows = spans(LENGTHS) if packed else [(n, n + 1) for n in range(3)]
    parts = [
        averaged((x[0, slice(*row)] if packed else x[row[0]]).astype(np.float64), one)
        for row, one in zip(rows, precise, strict=True)
    ]
    weights, gates, last = (list(part) for part in zip(*parts, strict=True))
    join = (lambda some: np.concatenate(some)[None]) if packed else np.stack
    found = ops.fused_additive_gate(
        convert(library, x),
        convert(library, before) if has_state else None,
        convert(library, bounds_of(LENGTHS)) if packed else None,
    )
    precise = [one.double().numpy() if library == "torch" else one.astype(np.float64) for one in found]
    for one, wanted in zip(precise, (join(weights), join(gates), np.stack(last)), strict=True):
        scale = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
        np.testing.assert_allclose(one, wanted, rtol=scale, atol=scale)
    kinds = [str(one.dtype).removeprefix("torch.") for one in found]
    assert kinds == [dtype, dtype, "float64" if dtype == "float64" else "float32"]


def test_dtypes_that_are_asked_for():
    x, _ = drawn("bfloat16", 3, 5)
    kinds = [one.dtype for one in ops.fused_additive_gate(x, None, None, np.float64, np.float32)]
    assert kinds == [np.float64, np.float32, np.float32]
    found = ops.fused_additive_gate(torch.zeros(1, 5, 2, 3), gate_dtype=torch.bfloat16)
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("has_state", [False, True])
def test_gradients_are_differences(has_state):
    x, before = (torch.from_numpy(one).requires_grad_() for one in drawn("float64", 1, sum(LENGTHS)))
    bounds = torch.tensor(bounds_of(LENGTHS))
    known = before.detach().isfinite()

    def gates(x, before):
        # Differences of infinite sums are none.
        given = torch.where(known, before, -torch.inf) if has_state else None
        weights, gates, last = ops.fused_additive_gate(x, given, bounds)
        return weights, gates, last[last.isfinite()]

    inputs = (x, before.detach().nan_to_num(neginf=0.0).requires_grad_())
    assert torch.autograd.gradcheck(gates, inputs, fast_mode=True)


def test_what_is_refused():
    x, before = drawn("float32", 3, 5)
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, T, H, K\), got \(5, 2, 5\)"):
        ops.fused_additive_gate(x[0])
    with pytest.raises(ValueError, match=r"^initial_state: expected shape \(3, 1, 2, 5\)"):
        ops.fused_additive_gate(x, before[:, 0])
    with pytest.raises(TypeError, match=r"^initial_state: expected dtype float32, got float64"):
        ops.fused_additive_gate(x, before.astype(np.float64))
    with pytest.raises(
        ValueError, match=r"^x: expected shape \(1, 5, 2, 5\), as cu_seqlens is given, got \(3"
    ):
        ops.fused_additive_gate(x, cu_seqlens=np.array([0, 5]))
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a last element of 5"):
        ops.fused_additive_gate(x[:1], cu_seqlens=np.array([0, 4]))
    with pytest.raises(TypeError, match=r"^x: expected dtype"):
        ops.fused_additive_gate(x.astype(np.int32))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("function", ["chunk_lightnet", "fused_recurrent_lightnet"])
def test_states_of_values_first(function, dtype):
    given = problem("lightnet", Sizes(tokens=35), dtype)
    state, z = given.states
    o, (final, sums) = getattr(ops, function)(
        **given.inputs,
        initial_state=(state.swapaxes(-1, -2), z),
        output_final_state=True,
        state_v_first=True,
    )
    check_found((o, (final.swapaxes(-1, -2), sums)), given.expected, dtype)


def test_either_state_may_be_absent():
    inputs = draw_inputs("lightnet", Sizes(), "float64")
    state, sums = draw_states("lightnet", Sizes(), "float64")
    for states in ((state, None), (None, sums), [None, None]):
        found = ops.chunk_lightnet(**inputs, initial_state=states, output_final_state=True)
        check_found(found, oracles.lightnet(**inputs, initial_state=tuple(states)), "float64")
    for wrong in (np.zeros((2, 2, 20, 8)), (1, 2, 3)):
        with pytest.raises(TypeError, match=r"^initial_state: expected a pair \(S, z\), got"):
            ops.chunk_lightnet(**inputs, initial_state=wrong)


def test_sums_are_returned_in_any_case():
    inputs = draw_inputs("lightnet", Sizes(), "float32")
    o, (final, z) = ops.chunk_lightnet(**inputs)
    wanted, (_, sums) = ops.chunk_lightnet(**inputs, output_final_state=True)
    assert final is None
    assert_same_bits((o, (z,)), (wanted, (sums,)))


@pytest.mark.parametrize("dtype", HALF)
def test_large_weights(dtype):
    """Sums of exponentials that no float32 holds."""
    inputs = draw_inputs("lightnet", Sizes(batch=1), dtype)
    inputs["k"] = (inputs["k"] * ml_dtypes.bfloat16(60)).astype(DTYPES[dtype])
    o, finals = ops.chunk_lightnet(**inputs, output_final_state=True)
    check_found((o, finals), expect("lightnet", inputs), dtype)
