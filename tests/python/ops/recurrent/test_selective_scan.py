"""Mamba's scan and one step of it, against their oracles."""

import numpy as np
import pytest
import torch

import subquad
from subquad.ops import selective_scan_fn, selective_state_update
from subquad.reference import recurrent as oracles

from .cases import DTYPES, HALF, accumulator, assert_largest_close, assert_mean_close, assert_same_bits, wide

CHANNELS, STATES = 6, 5
OPTIONS = ("D", "z", "delta_bias", "initial_state")
# How `B` and `C` are given.
FACTORS = {"constant": None, "steps": 0, "groups": 2}


def draw(tokens, dtype="float64", factors="steps", batch=2, seed=0, decay=1.0):
    """Arrays of a call by name: inputs of a dtype, parameters and states of its accumulators'."""
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal
    groups = FACTORS[factors]
    shape = {None: (CHANNELS, STATES), 0: (batch, STATES, tokens)}.get(groups, (batch, 2, STATES, tokens))
    inputs = {name: normal((batch, CHANNELS, tokens)) for name in ("u", "delta", "z")}
    parameters = {
        "A": -decay * np.exp(normal((CHANNELS, STATES))),
        "D": normal(CHANNELS),
        "delta_bias": normal(CHANNELS),
        "initial_state": normal((batch, CHANNELS, STATES)),
    }
    found = {name: x.astype(DTYPES[dtype]) for name, x in inputs.items()}
    found |= {name: x.astype(DTYPES[accumulator(dtype)]) for name, x in parameters.items()}
    kind = accumulator(dtype) if groups is None else dtype
    return found | {name: normal(shape).astype(DTYPES[kind]) for name in ("B", "C")}


def expect(arrays, *, delta_softplus=True):
    """Returns what the oracle says."""
    return oracles.selective_scan_fn(
        **{name: wide(x) for name, x in arrays.items()}, delta_softplus=delta_softplus
    )


def check(found, expected, dtype):
    out, last = found
    assert str(out.dtype).removeprefix("torch.") == dtype
    assert str(last.dtype).removeprefix("torch.") == accumulator(dtype)
    if dtype in HALF:
        assert_mean_close(out, expected[0])
    else:
        assert_largest_close(out, expected[0], dtype, "out")
    assert_largest_close(last, expected[1], dtype, "last_state")


def scan(arrays, **options):
    options = {"delta_softplus": True, "return_last_state": True, **options}
    return selective_scan_fn(**arrays, **options)


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(tokens, dtype):
    arrays = draw(tokens, dtype)
    check(scan(arrays), expect(arrays), dtype)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(factors, dtype, library, convert_all):
    arrays = draw(70, dtype, factors)
    for softplus in (False, True):
        # Without softplus, sizes of steps below 0 would make states grow.
        sizes = arrays["delta"] if softplus else abs(arrays["delta"])
        for left_out in (*OPTIONS, None):
            given = {name: x for name, x in (arrays | {"delta": sizes}).items() if name != left_out}
            if not softplus:
                given.pop("delta_bias", None)
            found = scan(convert_all(library, given), delta_softplus=softplus)
            assert isinstance(found[0], torch.Tensor) == (library == "torch")
            check(found, expect(given, delta_softplus=softplus), dtype)


def test_the_last_state_is_returned_when_asked_for():
    arrays = draw(10)
    out = selective_scan_fn(**arrays, delta_softplus=True)
    assert_same_bits((out, ()), (scan(arrays)[0], ()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_parts_are_the_whole(dtype):
    arrays = draw(100, dtype)
    expected = expect(arrays)
    for cut in (0, 1, 63, 64, 99, 100):
        parts, state = [], arrays["initial_state"]
        for span in (slice(0, cut), slice(cut, 100)):
            steps = ("u", "delta", "z", "B", "C")
            given = {name: x[..., span] if name in steps else x for name, x in arrays.items()}
            out, state = scan(given | {"initial_state": state})
            parts.append(out)
        check((np.concatenate(parts, axis=-1), state), expected, dtype)


@pytest.mark.parametrize("decay", [1e-6, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weak_and_strong_decay(decay, dtype):
    arrays = draw(300, dtype, decay=decay)
    check(scan(arrays), expect(arrays), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_change_no_bits(dtype, convert):
    arrays = draw(70, dtype, "groups")
    expected = scan(arrays)

    def turned(x):
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 2 else x

    def apart(x):
        whole = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        whole[..., ::2] = x
        return whole[..., ::2]

    def backwards(x):
        return np.ascontiguousarray(x[::-1])[::-1]

    for layout in (turned, apart, backwards):
        changed = {name: layout(x) for name, x in arrays.items()}
        out, last = scan(changed)
        assert_same_bits((out, (last,)), (expected[0], (expected[1],)))
        assert out.flags.c_contiguous
    tensors = {name: convert("torch", turned(x).copy()) for name, x in arrays.items()}
    out, last = scan(tensors)
    assert_same_bits((out, (last,)), (expected[0], (expected[1],)))


def test_threads_change_no_bits(keep_num_threads):
    generator = np.random.default_rng(0)
    u, delta, z = (generator.standard_normal((1, 700, 70)).astype(np.float32) for _ in range(3))
    b, c = (generator.standard_normal((1, 4, 70)).astype(np.float32) for _ in range(2))
    a = -np.exp(generator.standard_normal((700, 4))).astype(np.float32)
    found = []
    for threads in (1, 2, 5):
        subquad.set_num_threads(threads)
        tensors = [torch.from_numpy(x).requires_grad_() for x in (u, delta, a, b, c)]
        out = selective_scan_fn(*tensors, z=torch.from_numpy(z), delta_softplus=True)
        out.backward(torch.from_numpy(u))
        found.append([out.detach(), *(x.grad for x in tensors)])
    for others in found[1:]:
        for x, y in zip(found[0], others, strict=True):
            assert torch.equal(x, y)


def test_parameters_may_be_of_half_types():
    arrays = draw(30, "bfloat16")
    half = {name: x.astype(DTYPES["bfloat16"]) for name, x in arrays.items()}
    check(scan(half), expect(half), "bfloat16")


def differentiable(tokens, factors, dtype="float64"):
    arrays = draw(tokens, dtype, factors)
    return {
        name: torch.from_numpy(x.astype(np.float64)).to(getattr(torch, str(x.dtype))).requires_grad_()
        for name, x in arrays.items()
    }


def formula(arrays):
    """The scan in PyTorch's own operators, float64."""
    given = {name: x.double() for name, x in arrays.items()}
    u, delta, a = given["u"], given["delta"] + given["delta_bias"][:, None], given["A"]
    delta = torch.nn.functional.softplus(delta)

    def of_steps(x):
        if x.ndim == 2:
            return x[None, :, :, None]
        x = x[:, None] if x.ndim == 3 else x
        return x.repeat_interleave(u.shape[1] // x.shape[1], dim=1)

    b, c = of_steps(given["B"]), of_steps(given["C"])
    state, out = given["initial_state"], []
    for t in range(u.shape[2]):
        fade = torch.exp(delta[:, :, t, None] * a)
        at = -1 if b.shape[-1] == 1 else t
        state = fade * state + (delta * u)[:, :, t, None] * b[..., at]
        out.append((state * c[..., at]).sum(-1) + given["D"] * u[:, :, t])
    return torch.stack(out, dim=-1) * torch.nn.functional.silu(given["z"]), state


@pytest.mark.parametrize("factors", FACTORS)
def test_gradcheck(factors):
    tensors = differentiable(4, factors)

    def function(*given):
        return scan(dict(zip(tensors, given, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("tokens", [1, 63, 65, 200])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gradients(tokens, factors, dtype):
    tensors = differentiable(tokens, factors, dtype)
    generator = torch.Generator().manual_seed(0)
    found, expected = scan(tensors), formula(tensors)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    weights = [w.to(x.dtype) for w, x in zip(weights, found, strict=True)]
    got = torch.autograd.grad(found, list(tensors.values()), weights)
    want = torch.autograd.grad(expected, list(tensors.values()), [w.double() for w in weights])
    for name, x, y in zip(tensors, got, want, strict=True):
        assert x.dtype == tensors[name].dtype
        if dtype == "bfloat16":
            assert_mean_close(x, wide(y.double().numpy()))
        else:
            tolerance = {"float64": 1e-10, "float32": 2e-5}[dtype]
            assert (x - y).abs().max() <= tolerance * y.abs().max(), name


def test_gradients_of_the_last_state_alone():
    tensors = differentiable(70, "steps")
    names = [name for name in tensors if name not in {"C", "D", "z"}]
    got = torch.autograd.grad(scan(tensors)[1].sum(), [tensors[name] for name in names])
    want = torch.autograd.grad(formula(tensors)[1].sum(), [tensors[name] for name in names])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype))


def test_compiled_code_has_the_same_results():
    tensors = differentiable(70, "steps", "float32")
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(tensors), scan(tensors), strict=True):
        assert torch.equal(x, y)
    names = list(tensors)
    results = [
        torch.autograd.grad(function(tensors)[0].sum(), [tensors[name] for name in names])
        for function in (compiled, scan)
    ]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_autocast_casts_what_is_not_a_parameter():
    tensors = differentiable(70, "steps", "float32")
    rows = {name: tensors[name].bfloat16() for name in ("u", "delta", "B", "C", "z")}
    expected = scan({**tensors, **rows})
    with torch.autocast("cpu", torch.bfloat16):
        found = scan(tensors)
        compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)(tensors)
        with torch.no_grad():
            plain = scan(tensors)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]
    for one in (found, compiled, plain):
        assert all(map(torch.equal, one, expected))
    gradients = torch.autograd.grad(found[0].float().sum(), list(tensors.values()))
    assert all(x.dtype == torch.float32 for x in gradients)


def test_second_derivatives_are_refused():
    tensors = differentiable(5, "steps")
    (first,) = torch.autograd.grad(scan(tensors)[0].sum(), [tensors["u"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


SHAPES = {
    "u": [(2, 6), (2, 6, 10, 1)],
    "delta": [(2, 6, 9), (1, 6, 10), (2, 6)],
    "A": [(5, 5), (6,), (6, 5, 1)],
    "B": [(2, 5, 9), (2, 4, 10), (5, 5), (6, 4), (2, 4, 5, 10), (2, 0, 5, 10), (2,)],
    "C": [(2, 5, 9), (2, 4, 10), (5, 5), (6, 4), (2, 4, 5, 10), (2, 2, 5, 10), (2,)],
    "D": [(5,), (6, 1), ()],
    "z": [(2, 6, 9), (2, 6)],
    "delta_bias": [(5,), (6, 1)],
    "initial_state": [(2, 6, 4), (1, 6, 5), (6, 5), (2, 5, 6)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    arrays = draw(10, "float32")
    for shape in SHAPES[name]:
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            scan(arrays | {name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize("name", SHAPES)
def test_other_arguments(name):
    arrays = draw(10, "float32")
    for wrong in (np.int32, np.complex64, bool):
        with pytest.raises(TypeError, match=f"^{name}: expected dtype"):
            scan(arrays | {name: arrays[name].astype(wrong)})
    for wrong in (3.0, "no", object()):
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            scan(arrays | {name: wrong})
    if name != "u":
        with pytest.raises(TypeError, match=f"^{name}: expected a NumPy array"):
            scan(arrays | {name: torch.from_numpy(arrays[name])})
        with pytest.raises(TypeError, match=f"^{name}: expected dtype float32"):
            scan(arrays | {name: arrays[name].astype(np.float64)})
    if name not in OPTIONS:
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            scan(arrays | {name: None})


def test_other_devices():
    tensors = {name: torch.from_numpy(x) for name, x in draw(10, "float32").items()}
    with pytest.raises(ValueError, match=r"^u: expected a CPU array, got one on meta"):
        scan(tensors | {"u": tensors["u"].to("meta")})


def test_unknown_keywords():
    with pytest.raises(TypeError, match="no_such"):
        scan(draw(3), no_such=1)


HEADS = {"none": (None, None), "one group": (4, 1), "groups": (4, 2)}


def draw_step(dtype, heads, *, seed=0, rows=3, channels=20, states=17, state_dtype=None):
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal
    heads, groups = HEADS[heads]
    of_row = (channels,) if heads is None else (heads, channels)
    factors = (rows, states) if heads is None else (rows, groups, states)
    acc = DTYPES[accumulator(dtype)]
    return {
        "state": normal((rows, *of_row, states)).astype(DTYPES[state_dtype] if state_dtype else acc),
        **{name: normal((rows, *of_row)).astype(DTYPES[dtype]) for name in ("x", "dt", "z")},
        "A": -np.exp(normal((*of_row, states))).astype(acc),
        **{name: normal(factors).astype(DTYPES[dtype]) for name in ("B", "C")},
        "D": normal(of_row).astype(acc),
        "dt_bias": normal(of_row).astype(acc),
    }


def expect_step(arrays, **options):
    given = {name: wide(x) for name, x in arrays.items()}
    return oracles.selective_state_update(**given, **options)


def check_step(arrays, expected, dtype, **options):
    state = arrays["state"]
    out = selective_state_update(**arrays, **options)
    assert str(out.dtype).removeprefix("torch.") == dtype
    (assert_mean_close if dtype in HALF else lambda x, y: assert_largest_close(x, y, dtype, "out"))(
        out, expected[0]
    )
    state_dtype = str(state.dtype).removeprefix("torch.")
    if state_dtype in HALF:
        assert_mean_close(state, expected[1])
    else:
        assert_largest_close(state, expected[1], dtype, "state")


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps(dtype, heads, library, convert_all):
    for softplus in (False, True):
        for left_out in ("D", "z", "dt_bias", None):
            arrays = {name: x for name, x in draw_step(dtype, heads).items() if name != left_out}
            if not softplus:
                # Sizes of steps below 0 would make states grow.
                arrays |= {name: abs(arrays[name]) for name in {"dt", "dt_bias"} - {left_out}}
            expected = expect_step(arrays, dt_softplus=softplus)
            check_step(convert_all(library, arrays), expected, dtype, dt_softplus=softplus)


@pytest.mark.parametrize("dtype", HALF)
def test_steps_of_half_states(dtype):
    arrays = draw_step(dtype, "groups", state_dtype=dtype)
    check_step(arrays, expect_step(arrays, dt_softplus=True), dtype, dt_softplus=True)


def test_steps_are_the_scan():
    arrays = draw(20)
    expected, state = scan(arrays)
    state, outs = arrays["initial_state"].copy(), []
    for t in range(20):
        at = {name: np.ascontiguousarray(arrays[name][..., t]) for name in ("u", "delta", "z", "B", "C")}
        out = selective_state_update(
            state,
            at["u"],
            at["delta"],
            arrays["A"],
            at["B"],
            at["C"],
            arrays["D"],
            at["z"],
            arrays["delta_bias"],
            dt_softplus=True,
        )
        outs.append(out)
    np.testing.assert_allclose(np.stack(outs, axis=-1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_expanded_parameters(library, convert):
    arrays = draw_step("float32", "groups")
    for name in ("dt", "D", "dt_bias"):
        arrays[name] = np.broadcast_to(arrays[name][..., :1], arrays[name].shape)
    arrays["A"] = np.broadcast_to(arrays["A"][..., :1, :1], arrays["A"].shape)
    expected = expect_step(arrays, dt_softplus=True)
    if library == "torch":
        arrays = {
            name: convert("torch", x[..., :1].copy()).expand(x.shape)
            if name in {"dt", "D", "dt_bias"}
            else convert("torch", x[..., :1, :1].copy()).expand(x.shape)
            if name == "A"
            else convert("torch", x.copy())
            for name, x in arrays.items()
        }
    check_step(arrays, expected, "float32", dt_softplus=True)


def test_rows_of_some_states():
    arrays = draw_step("float32", "none", rows=3)
    arrays["state"] = np.random.default_rng(1).standard_normal((5, 20, 17)).astype(np.float32)
    indices = np.array([4, -1, 0], np.int32)
    expected = expect_step(arrays, state_batch_indices=indices)
    before = arrays["state"].copy()
    check_step(arrays, expected, "float32", state_batch_indices=indices)
    np.testing.assert_array_equal(arrays["state"][1:4], before[1:4])


def test_wrong_indices():
    arrays = draw_step("float32", "none", rows=3)
    for wrong in ([0, 1, 3], [0, 1, 1]):
        with pytest.raises(ValueError, match=r"^state_batch_indices: expected numbers of 3 states"):
            selective_state_update(**arrays, state_batch_indices=np.array(wrong))
    with pytest.raises(ValueError, match=r"^state_batch_indices: expected shape"):
        selective_state_update(**arrays, state_batch_indices=np.array([0, 1]))
    with pytest.raises(TypeError, match=r"^state_batch_indices: expected dtype"):
        selective_state_update(**arrays, state_batch_indices=np.array([0.0, 1.0, 2.0]))


WRONG_STEPS = {
    "state": [(3, 4, 20), (4, 4, 20, 17), (3, 20)],
    "x": [(3, 4, 19), (3, 20), (2, 4, 20)],
    "dt": [(3, 4, 19), (3, 20)],
    "A": [(4, 20, 16), (20, 17)],
    "B": [(3, 3, 17), (3, 17), (3, 2, 16)],
    "C": [(3, 3, 17), (3, 17), (3, 1, 17)],
    "D": [(4, 19), (4,)],
    "z": [(3, 4, 19), (3, 20)],
    "dt_bias": [(4, 19), (4,)],
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_wrong_steps(name):
    arrays = draw_step("float32", "groups")
    for shape in WRONG_STEPS[name]:
        with pytest.raises(
            ValueError, match=r"^(state|x|A|B): expected" if name == "state" else f"^{name}: expected shape"
        ):
            selective_state_update(**arrays | {name: np.zeros(shape, np.float32)})
    for wrong in (3.0, object(), arrays[name].astype(np.int32), torch.from_numpy(arrays[name])):
        with pytest.raises(TypeError, match=r"^[A-Za-z_]+: expected"):
            selective_state_update(**arrays | {name: wrong})


def test_states_that_cannot_be_written():
    arrays = draw_step("float32", "groups")
    locked = arrays["state"].copy()
    locked.setflags(write=False)
    with pytest.raises(ValueError, match=r"^state: expected a writable array"):
        selective_state_update(**arrays | {"state": locked})
    with pytest.raises(ValueError, match=r"^state: expected"):
        selective_state_update(**arrays | {"state": np.repeat(arrays["state"], 2, axis=-1)[..., ::2]})
    with pytest.raises(ValueError, match=r"^state: expected memory of its own"):
        selective_state_update(**arrays | {"x": arrays["state"].reshape(-1)[:240].reshape(3, 4, 20)})


def test_steps_have_no_gradient():
    tensors = {name: torch.from_numpy(x) for name, x in draw_step("float32", "groups").items()}
    with pytest.raises(NotImplementedError, match=r"^x: a tensor that requires grad is not supported"):
        selective_state_update(**tensors | {"x": tensors["x"].clone().requires_grad_()})
