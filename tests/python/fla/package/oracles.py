"""Layers of flash-linear-attention in float64 without its kernels and without subquad's: with oracles in their places."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional

from subquad.fla.families import FAMILIES
from subquad.reference import recurrent

# What says how to compute, not what.
WITHOUT_EFFECT = {
    "cu_seqlens_cpu",
    "chunk_indices",
    "safe_gate",
    "disable_recompute",
    "chunk_size",
    "checkpoint_level",
}


def _operator_oracle(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns an operator that binds arguments as `original` does and computes what the NumPy oracle of its family does."""
    for prefix in ("fused_recurrent_", "fused_chunk_", "chunk_", "parallel_", "fused_"):
        if name.startswith(prefix):
            family = name.removeprefix(prefix)
            break
    # RWKV-7 is told how strong its gates can be.
    without_effect = WITHOUT_EFFECT | ({"lower_bound"} if family == "rwkv7" else set())
    oracle = getattr(recurrent, {"gdn": "gated_delta_rule", "abc": "gsa"}.get(family, family))
    signature, accepted = inspect.signature(original), inspect.signature(oracle).parameters

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        given.pop("kwargs", None)
        final = given.pop("output_final_state", False)
        if "g" in given and "g" not in accepted:
            given["gk"] = given.pop("g")
        for key in [key for key in given if key not in accepted]:
            value = given.pop(key)
            assert key in without_effect or value is None or value is False, f"{name}: {key}"
        arrays = {key: _to_numpy(value) for key, value in given.items()}
        o, state = oracle(**arrays)
        # LightNet's sums of weights are there whether states are asked for or not.
        return torch.from_numpy(o), _to_torch(state) if final or family == "lightnet" else None

    return call


def _to_numpy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to_numpy(x) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    return (value.double() if value.is_floating_point() else value).numpy()


def _to_torch(state: Any) -> Any:
    return tuple(map(_to_torch, state)) if isinstance(state, tuple) else torch.from_numpy(np.asarray(state))


def _activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return x if activation is None else x * torch.sigmoid(x)


def causal_conv1d(x, weight, bias=None, residual=None, initial_state=None, output_final_state=False,
                  activation=None, backend=None, cu_seqlens=None, **_):  # fmt: skip
    """The NumPy oracle, whose states are a token shorter, with channels before tokens."""
    shape = x.shape
    columns = x.reshape(*shape[:2], -1).transpose(1, 2)
    state = None if initial_state is None else initial_state[..., 1:].double().numpy()
    y, _ = recurrent.causal_conv1d_fn(
        columns.double().numpy(),
        weight.double().numpy(),
        None if bias is None else bias.double().numpy(),
        initial_states=state,
        activation=activation,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.numpy(),
    )
    assert not output_final_state
    y = torch.from_numpy(y).transpose(1, 2).reshape(shape)
    return y if residual is None else y + residual, None


def rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False, *, eps=1e-6, **_):
    """RMSNorm, then the gate."""
    assert residual is None
    assert not prenorm
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y * torch.sigmoid(g) if activation == "sigmoid" else y * g * torch.sigmoid(g)


def rms_norm_swish_gate_linear(x, g, norm_weight, norm_bias, linear_weight, linear_bias, *, eps=1e-6):
    """RMSNorm, the gate, then the linear map."""
    return functional.linear(
        rms_norm_gated(x, g, norm_weight, norm_bias, eps=eps), linear_weight, linear_bias
    )


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    """The package's own formula, for weights that may be missing."""
    from fla.modules.norm.layernorm import rms_norm_ref

    weight = torch.ones(x.shape[-1], dtype=x.dtype) if weight is None else weight
    return rms_norm_ref(x, weight, bias, residual, eps, prenorm)


def rms_norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-5, **_):
    """RMSNorm, then the linear map."""
    return functional.linear(rms_norm(x, norm_weight, norm_bias, residual, eps), linear_weight, linear_bias)


def group_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False,
               is_rms_norm=False, num_groups=1):  # fmt: skip
    """The package's own formula."""
    from fla.modules.norm.layernorm import group_norm_ref

    return group_norm_ref(x, weight, bias, num_groups, residual, eps, is_rms_norm, prenorm)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """The package's own formula."""
    from fla.modules.norm.layernorm_gated import rms_norm_ref

    return rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate, upcast=False)


def rotary_embedding(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, **_):
    """The package's own formula, for each sequence."""
    from fla.modules.rotary.ops import rotary_embedding_ref

    assert not inplace
    rows = x.split(1) if cu_seqlens is None else x.split(cu_seqlens.diff().tolist(), 1)
    offsets = seqlen_offsets.tolist() if torch.is_tensor(seqlen_offsets) else [seqlen_offsets] * len(rows)
    tables = [
        [table[o : o + row.shape[1]] for table in (cos, sin)] for row, o in zip(rows, offsets, strict=True)
    ]
    turned = [rotary_embedding_ref(row, *t, interleaved) for row, t in zip(rows, tables, strict=True)]
    return torch.cat(turned, 0 if cu_seqlens is None else 1)


def token_shift(x, cu_seqlens=None, cache=None, output_cache=False, **_):
    """The package's own formula."""
    from fla.modules.token_shift import token_shift_ref

    assert cache is None
    return (token_shift_ref(x, cu_seqlens), None) if output_cache else token_shift_ref(x, cu_seqlens)


def fused_mul_recurrent_rwkv7(
    r, w, k, v, kk, a, scale=1.0, initial_state=None, output_final_state=False, **_
):
    """RWKV-7's recurrence, one token after the other."""
    assert initial_state is None
    assert not output_final_state
    state = torch.zeros(r.shape[0], r.shape[2], r.shape[3], v.shape[3], dtype=r.dtype)
    rows = []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhkv,bhk->bhv", state, kk[:, t])
        state = state * w[:, t].exp()[..., None] - (kk * a)[:, t][..., None] * removed[..., None, :]
        state = state + k[:, t][..., None] * v[:, t][..., None, :]
        rows.append(torch.einsum("bhkv,bhk->bhv", state, r[:, t]))
    return scale * torch.stack(rows, 1), None


def _oracles() -> Iterator[tuple[Any, Any]]:
    """Yields functions of the package with what stands in for them."""
    for module, names in FAMILIES.items():
        # Not those of modules within a family, which no layer calls.
        if module.count(".") == 2:
            for name in names:
                original = getattr(import_module(module), name)
                yield original, _operator_oracle(original, name)
    activations = import_module("fla.modules.activations")
    yield activations.swish, lambda x: x * torch.sigmoid(x)
    yield activations.sigmoid, torch.sigmoid
    yield activations.logsigmoid, lambda x, temperature=1.0: functional.logsigmoid(x) / temperature
    yield activations.swiglu, lambda x, y: x * torch.sigmoid(x) * y
    yield activations.swiglu_linear, lambda x, y, w, b: functional.linear(x * torch.sigmoid(x) * y, w, b)
    layernorm = import_module("fla.modules.norm.layernorm")
    yield layernorm.rms_norm, rms_norm
    yield layernorm.rms_norm_linear, rms_norm_linear
    yield layernorm.group_norm, group_norm
    yield layernorm.layer_norm, group_norm
    gated = import_module("fla.modules.norm.fused_norm_gate")
    yield gated.rms_norm_gated, rms_norm_gated
    yield gated.rms_norm_swish_gate_linear, rms_norm_swish_gate_linear
    yield import_module("fla.modules.norm.layernorm_gated").rmsnorm_fn, rmsnorm_fn
    yield (
        import_module("fla.modules.norm.l2norm").l2norm,
        lambda x, eps=1e-6, output_dtype=None: x / torch.sqrt(x.square().sum(-1, keepdim=True) + eps),
    )
    yield import_module("fla.modules.causal_conv1d").causal_conv1d, causal_conv1d
    yield import_module("fla.modules.rotary").rotary_embedding, rotary_embedding
    yield import_module("fla.modules.token_shift").token_shift, token_shift
    yield import_module("fla.ops.rwkv7").fused_mul_recurrent_rwkv7, fused_mul_recurrent_rwkv7
    mixing = import_module("fla.ops.rwkv7.fused_addcmul")
    yield mixing.fused_addcmul_rwkv7, mixing.torch_addcmul_rwkv7
    keys = import_module("fla.ops.rwkv7.fused_k_update")
    yield keys.fused_k_rwkv7, lambda k, a, ka, *lengths, **more: keys.k_update_ref(k, a, ka)
    correction = import_module("fla.ops.rwkv7.gate_output_correction")
    yield correction.gate_output_correction, correction.gate_output_correction_ref


@functools.cache
def _table() -> dict[int, tuple[Any, Any]]:
    return {id(original): (original, oracle) for original, oracle in _oracles()}


def _float(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


@contextmanager
def in_place() -> Iterator[None]:
    """All functions of the package that have an oracle are it, also for layers that are built in the meantime.

    Their own `x.float()` leaves float64 as it is. `subquad.fla` must not be installed.
    """
    changed = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "fla":
            continue
        table = vars(module).get("ACT2FN")
        for names in (vars(module), table if type(table) is dict else {}):
            for key, value in list(names.items()):
                original, oracle = _table().get(id(value), (None, None))
                if original is not None and original is value:
                    changed.append((names, key, value))
                    names[key] = oracle
    try:
        with patch.object(torch.Tensor, "float", _float):
            yield
    finally:
        for names, key, value in changed:
            names[key] = value
