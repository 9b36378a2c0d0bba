"""What layers call besides operators, against the formulas that flash-linear-attention has for its own tests."""

from importlib import import_module

import pytest
import torch
from torch.nn import functional

from subquad.fla import activations, convolution, gated_norms, norms, positions, rwkv7

norm_refs = import_module("fla.modules.norm.layernorm")
gated_refs = import_module("fla.modules.norm.layernorm_gated")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Units in the last place of the largest expected number: of the result, and of a few sums before it.
UNITS = 4


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float64: torch.randn(*shape, generator=generator).to(dtype)


def assert_near(found, wanted, dtype):
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    limit = UNITS * torch.finfo(dtype).eps * max(1.0, float(wanted.abs().max()))
    assert float((found.double() - wanted).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rms", [False, True])
def test_norms(draw, dtype, with_bias, with_residual, groups, rms):
    x, residual, weight, bias = (
        draw(*shape, dtype=dtype) for shape in ((2, 5, 24), (2, 5, 24), (24,), (24,))
    )
    bias, residual = bias if with_bias else None, residual if with_residual else None
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    wanted, total = norm_refs.group_norm_ref(
        *wide[:3], num_groups=groups, residual=wide[3], is_rms_norm=rms, prenorm=True
    )
    found, found_total = norms.group_norm(
        x, weight, bias, residual, prenorm=True, is_rms_norm=rms, num_groups=groups
    )
    assert_near(found, wanted, dtype)
    assert_near(found_total, total, dtype)
    if groups == 1:
        function = norms.rms_norm if rms else norms.layer_norm
        assert torch.equal(function(x, weight, bias, residual), found)
        matrix, offset = draw(7, 24, dtype=dtype), draw(7, dtype=dtype)
        function = norms.rms_norm_linear if rms else norms.layer_norm_linear
        projected = function(x, weight, bias, matrix, offset, residual)
        assert torch.equal(projected, functional.linear(found, matrix, offset))


def test_residuals_stay_wide(draw):
    x, residual, weight = draw(3, 8, dtype=torch.bfloat16), draw(3, 8, dtype=torch.float32), draw(8)
    found, total = norms.rms_norm(x, weight, None, residual, prenorm=True)
    assert (found.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float() + residual)
    _, total = norms.rms_norm(x, None, None, prenorm=True, residual_in_fp32=True)
    assert torch.equal(total, x.float())
    _, total = norms.rms_norm(x, None, None, prenorm=True)
    assert total is x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("rms", [False, True])
def test_gated_norms(draw, dtype, activation, rms):
    x, g, weight, bias = (draw(*shape, dtype=dtype) for shape in ((2, 5, 16), (2, 5, 16), (16,), (16,)))
    wide = [t.double() for t in (x, weight, bias)]
    reference = norm_refs.rms_norm_ref if rms else norm_refs.layer_norm_ref
    gate = g.double().sigmoid() * (1.0 if activation == "sigmoid" else g.double())
    function = gated_norms.rms_norm_gated if rms else gated_norms.layer_norm_gated
    found = function(x, g, weight, bias, activation)
    assert_near(found, reference(*wide, eps=1e-6) * gate, dtype)
    assert torch.equal(function(x, g.view(10, 16), weight, bias, activation, prenorm=True)[0], found)
    if activation == "swish":
        matrix = draw(7, 16, dtype=dtype)
        linear = "rms_norm_swish_gate_linear" if rms else "layer_norm_swish_gate_linear"
        projected = getattr(gated_norms, linear)(x, g, weight, bias, matrix, None)
        assert torch.equal(projected, functional.linear(found, matrix))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("with_gate", [False, True])
def test_norms_with_a_gate_before_or_after(draw, dtype, group_size, before, with_gate):
    x, z, weight, bias = (draw(*shape, dtype=dtype) for shape in ((2, 5, 16), (2, 5, 16), (16,), (16,)))
    z = z if with_gate else None
    wide = [None if t is None else t.double() for t in (x, weight, bias, z)]
    # The formula rounds weights to float32.
    tolerated = torch.float32 if dtype == torch.float64 else dtype
    wanted = gated_refs.rms_norm_ref(*wide, 1e-6, group_size, before, upcast=False)
    found = gated_norms.rmsnorm_fn(x, weight, bias, z, 1e-6, group_size, before)
    assert found.dtype == dtype
    assert_near(found.to(tolerated), wanted, tolerated)
    centred = gated_norms.layernorm_fn(x, weight, bias, None, 1e-6, group_size)
    by_group = x if group_size is None else x.view(2, 5, -1, group_size)
    by_group = functional.layer_norm(by_group.double(), by_group.shape[-1:], eps=1e-6).view(x.shape)
    assert_near(centred, by_group * wide[1] + wide[2], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm(draw, dtype):
    x = draw(3, 4, 16, dtype=dtype)
    wanted = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert_near(norms.l2norm(x), wanted, dtype)
    assert_near(norms.l2norm(x, output_dtype=torch.float64).float(), wanted, torch.float32)


def _powglu(x, y, power=3.0):
    positive = x.clamp_min(1e-300)
    return torch.where(x > 0, positive ** (power / (positive.sqrt() + 1)), x) * x.sigmoid() * y


UNARY = {
    "sigmoid": torch.sigmoid,
    "logsigmoid": functional.logsigmoid,
    "swish": functional.silu,
    "sqrelu": lambda x: x.clamp_min(0) ** 2,
    "fast_gelu_impl": lambda x: functional.gelu(x, approximate="tanh"),
}
BINARY = {
    "swiglu": lambda x, y: functional.silu(x) * y,
    "sigmoidglu": lambda x, y: x.sigmoid() * y,
    "powglu": _powglu,
    "bias_gelu_impl": lambda x, y: functional.gelu(x + y, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_activations(draw, name, dtype):
    x, y = 3.0 * draw(3, 16, dtype=dtype), draw(3, 16, dtype=dtype)
    function = getattr(activations, name)
    inputs = (x,) if name in UNARY else (x, y)
    found = function(*inputs)
    assert_near(found, {**UNARY, **BINARY}[name](*(t.double() for t in inputs)), dtype)
    linear = getattr(activations, f"{name}_linear", None)
    if linear is not None:
        matrix, offset = draw(5, 16, dtype=dtype), draw(5, dtype=dtype)
        assert torch.equal(linear(x, y, matrix, offset), functional.linear(found, matrix, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "logsigmoid", "swish"])
def test_directions_of_activations(draw, name, dtype):
    # Columns of a wider tensor.
    x, dy = (3.0 * draw(3, 32, dtype=dtype)[:, ::2] for _ in range(2))
    forward, backward = (getattr(activations, f"{name}_{way}") for way in ("fwd", "bwd"))
    wide = x.double().clone().requires_grad_()
    wanted = UNARY[name](wide)
    (slope,) = torch.autograd.grad(wanted, wide, dy.double())
    assert_near(forward(x), wanted.detach(), dtype)
    assert_near(backward(x, dy), slope, dtype)
    assert forward(x).is_contiguous()
    assert backward(x=x, dy=dy, output_contiguous=True).is_contiguous()


def test_the_temperature_of_logsigmoid(draw):
    x = draw(3, 4).requires_grad_()
    activations.logsigmoid(x, 4.0).sum().backward()
    assert torch.allclose(
        activations.logsigmoid_fwd(x.detach(), 4.0), functional.logsigmoid(x.detach()) / 4.0
    )
    assert torch.allclose(activations.logsigmoid_bwd(x.detach(), torch.ones(3, 4).double(), 4.0), x.grad)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rotary_embedding(draw, interleaved, packed):
    reference = import_module("fla.modules.rotary.ops").rotary_embedding_ref
    x, angles = draw(1 if packed else 2, 12, 3, 10), draw(20, 4)
    cos, sin = angles.cos(), angles.sin()
    offsets = torch.tensor([3, 5])
    lengths = [5, 7] if packed else [12, 12]
    rows = x[0].split(lengths) if packed else x
    wanted = [
        reference(row[None], cos[o : o + n], sin[o : o + n], interleaved)[0]
        for row, o, n in zip(rows, (3, 5), lengths, strict=True)
    ]
    wanted = torch.cat(wanted)[None] if packed else torch.stack(wanted)
    cu_seqlens = torch.tensor([0, 5, 12]) if packed else None
    found = positions.rotary_embedding(x, cos, sin, interleaved, False, offsets, cu_seqlens)
    assert torch.allclose(found, wanted, rtol=1e-14)
    in_place = x.clone()
    result = positions.rotary_embedding(in_place, cos, sin, interleaved, True, offsets, cu_seqlens)
    assert result is in_place
    assert torch.equal(result, found)


def test_rotary_embedding_leaves_positions_without_angles(draw):
    # Padding on the left has positions below 0.
    x, angles = draw(1, 6, 2, 8), draw(4, 4)
    found = positions.rotary_embedding(x, angles.cos(), angles.sin(), seqlen_offsets=-1)
    assert torch.equal(found[:, [0, 5]], x[:, [0, 5]])
    rest = positions.rotary_embedding(x[:, 1:5], angles.cos(), angles.sin())
    assert torch.equal(found[:, 1:5], rest)


def test_token_shift(draw):
    reference = import_module("fla.modules.token_shift").token_shift_ref
    x, bounds = draw(1, 12, 4), torch.tensor([0, 5, 5, 6, 12])
    assert torch.equal(positions.token_shift(x.view(3, 4, 4)), reference(x.view(3, 4, 4)))
    assert torch.equal(positions.token_shift(x, bounds), reference(x, bounds))
    cache = draw(4, 4)
    found, last = positions.token_shift(x, bounds, cache, output_cache=True)
    assert torch.equal(found[0, [0, 5, 6]], cache[[0, 2, 3]] - x[0, [0, 5, 6]])
    assert torch.equal(found[0, [1, 7]], x[0, [0, 6]] - x[0, [1, 7]])
    assert torch.equal(last, torch.stack([x[0, 4], cache[1], x[0, 5], x[0, 11]]))
    whole, _ = positions.token_shift(x.view(2, 6, 4), cache=cache[:2], output_cache=True)
    first, middle = positions.token_shift(x.view(2, 6, 4)[:, :5], cache=cache[:2], output_cache=True)
    second = positions.token_shift(x.view(2, 6, 4)[:, 5:], cache=middle)
    assert torch.equal(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("bounds", [[1, 12], [0, 7, 5, 12], [0, 11], []])
def test_bounds_of_sequences_that_make_no_sense(draw, bounds):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected bounds that rise from 0 to 12"):
        positions.token_shift(draw(1, 12, 4), bounds)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 6), (1, 3, 6), (3, 6), (3, 1, 2, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions_of_one_more_token(draw, dtype, shape, with_residual):
    x, cache, weight, bias = (draw(*s, dtype=dtype) for s in ((3, 6), (3, 6, 4), (6, 4), (6,)))
    residual = draw(3, 6, dtype=dtype) if with_residual else None
    wanted_last = torch.cat([cache[..., 1:], x[..., None]], -1)
    sums = (wanted_last.double() * weight.double()).sum(-1) + bias.double()
    wanted = functional.silu(sums) + (residual.double() if with_residual else 0.0)
    added = residual.view(shape) if with_residual else None
    found, last = convolution.causal_conv1d_update(x.view(shape), cache, added, weight, bias, "silu")
    assert last is cache
    assert torch.equal(cache, wanted_last)
    assert_near(found, wanted.view(shape), dtype)


def test_convolutions_that_make_no_sense(draw):
    x, cache, weight = draw(2, 1, 4), draw(2, 4, 3), draw(4, 3)
    update = convolution.causal_conv1d_update
    with pytest.raises(TypeError, match=r"weight: expected a PyTorch tensor.*, got NoneType"):
        update(x, cache)
    with pytest.raises(ValueError, match="activation: expected None, 'silu' or 'swish', got 'relu'"):
        update(x, cache, weight=weight, activation="relu")
    for other in (draw(2, 4, 1), draw(3, 4, 3), draw(2, 3, 3), draw(2, 4)):
        with pytest.raises(ValueError, match=r"cache: expected shape \(2, 4, S\) with S of at least 2"):
            update(x, other, weight=weight)
    with pytest.raises(TypeError, match="cache: expected dtype float64 as x has, got float32"):
        update(x, cache.float(), weight=weight)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 1, 4\) as x has, got \(2, 4\)"):
        update(x, cache, x[:, 0], weight)


def test_norms_that_make_no_sense(draw):
    x, weight = draw(2, 6), draw(6)
    with pytest.raises(ValueError, match="x: expected a last axis that 4 groups divide, got 6"):
        norms.group_norm(x, weight, None, num_groups=4)
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 6\) as x has, got \(6,\)"):
        norms.layer_norm(x, weight, None, weight)
    with pytest.raises(ValueError, match="group_size: expected a divisor of 6, got 4"):
        gated_norms.rmsnorm_fn(x, weight, None, group_size=4)
    with pytest.raises(ValueError, match="activation: expected 'swish', 'silu' or 'sigmoid', got 'relu'"):
        gated_norms.rms_norm_gated(x, x, weight, None, "relu")


def test_parts_of_rwkv7(draw):
    x, delta, *mixes = draw(2, 5, 8), draw(2, 5, 8), *(draw(1, 1, 8) for _ in range(6))
    mixing = import_module("fla.ops.rwkv7.fused_addcmul")
    for given in (mixes, mixes[:5]):
        wanted = mixing.torch_addcmul_rwkv7(x, delta, *given)
        for one, other in zip(rwkv7.fused_addcmul_rwkv7(x, delta, *given), wanted, strict=True):
            assert (one is other is None) or torch.allclose(one, other, rtol=1e-12)
    keys = import_module("fla.ops.rwkv7.fused_k_update")
    found, wanted = (f(x, delta, mixes[0][0, 0]) for f in (rwkv7.fused_k_rwkv7, keys.k_update_ref))
    assert torch.allclose(found, wanted, rtol=1e-12)
    o, g, r, k, v, weights = draw(2, 5, 8), draw(2, 5, 8), *draw(3, 2, 5, 2, 4), draw(2, 4)
    correction = import_module("fla.ops.rwkv7.gate_output_correction")
    wanted = correction.gate_output_correction_ref(o, r, k, weights, v, g)
    assert torch.allclose(rwkv7.gate_output_correction(o, r, k, weights, v, g), wanted, rtol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_recurrence_of_rwkv7(draw, reverse):
    r, k, v, kk, a, state = *draw(5, 2, 6, 3, 4), draw(2, 3, 4, 4)
    w, kk, a = -draw(2, 6, 3, 4).abs(), functional.normalize(kk, dim=-1), a.sigmoid()
    wanted, last = torch.zeros_like(v), state.clone()
    for t in reversed(range(6)) if reverse else range(6):
        removed = torch.einsum("bhkv,bhk->bhv", last, kk[:, t])
        last = last * w[:, t].exp()[..., None] - torch.einsum("bhk,bhv->bhkv", (kk * a)[:, t], removed)
        last = last + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        wanted[:, t] = torch.einsum("bhkv,bhk->bhv", last, r[:, t])
    found, final = rwkv7.fused_mul_recurrent_rwkv7(
        r, w, k, v, kk, a, initial_state=state, output_final_state=True, reverse=reverse
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(final, last)
    with pytest.raises(TypeError, match="w: expected an array, got None"):
        rwkv7.fused_mul_recurrent_rwkv7(r, None, k, v, kk, a)
    with pytest.raises(ValueError, match="r: expected shape"):
        rwkv7.fused_mul_recurrent_rwkv7(r[0], w, k, v, kk, a)


DIFFERENTIABLE = {
    "rms_norm": lambda x, w, m: norms.rms_norm(x, w, w, x.flip(0)),
    "group_norm": lambda x, w, m: norms.group_norm(x, w, w, num_groups=2),
    "rms_norm_gated": lambda x, w, m: gated_norms.rms_norm_gated(x, x.flip(1), w, None),
    "rmsnorm_fn": lambda x, w, m: gated_norms.rmsnorm_fn(x, w, None, x.flip(1), group_size=2),
    "swiglu_linear": lambda x, w, m: activations.swiglu_linear(x, x.flip(0), m, w),
    "powglu": lambda x, w, m: activations.powglu(x, x.flip(0)) * w * m[0],
    "l2norm": lambda x, w, m: norms.l2norm(x) * w * m[0],
    "token_shift": lambda x, w, m: positions.token_shift(x, torch.tensor([0, 1, 3]), m[:2] * w),
    "rotary_embedding": lambda x, w, m: positions.rotary_embedding(
        (x * w)[:, :, None], m[:, :2], m[:, 2:], cu_seqlens=torch.tensor([0, 1, 3])
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(draw, name):
    inputs = [t.requires_grad_() for t in (draw(1, 3, 4), draw(4), draw(4, 4))]
    assert torch.autograd.gradcheck(DIFFERENTIABLE[name], inputs)
