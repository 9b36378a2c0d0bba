"""Multi-head latent attention: calls of few queries read the latent cache as it is, instead of expanding it.

Layers of this kind cache a latent `c` of width `R` and a rotary key `r` of width `P` for each token, which all
heads share. transformers expands all of them to the keys and values of `H` heads at every call (`expand_kv`)::

    k[h, t] = [W_K[h] c[t], r[t]]          scores[h, t] = q_nope[h] . W_K[h] c[t] + q_rot[h] . r[t]
    v[h, t] = W_V[h] c[t]                  out[h]       = sum_t p[h, t] W_V[h] c[t]

Both products can be formed in another order (DeepSeek-V2, 2024, section 2.1.2)::

    scores[h, t] = [W_K[h]^T q_nope[h], q_rot[h]] . [c[t], r[t]]          out[h] = W_V[h] sum_t p[h, t] c[t]

That is attention with one key/value head of width `R + P`, whose values are the first `R` columns of its keys.

`expand_kv` is shadowed on the modules of a patched model. It returns `LatentStates`: keys and values that are
expanded when anything else than subquad's attention asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from subquad.hf.delegate import Call
from subquad.hf.registry import NAME
from subquad.hf.tracing import PLAIN_TYPES, is_tracing

_SEAM = "expand_kv"
_ATTRIBUTES = ("kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_RANK = 4


@dataclass(frozen=True)
class _Widths:
    """Columns of one head: without and with rotation in a key, and of a value."""

    nope: int
    rot: int
    value: int


def _widths(module: Any) -> _Widths:
    return _Widths(module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim)


def is_latent(module: torch.nn.Module) -> bool:
    """Whether a module that uses the attention interface looks like multi-head latent attention."""
    return all(hasattr(module, name) for name in _ATTRIBUTES)


@lru_cache(maxsize=256)
def _expands_as_described(cls: type) -> bool:
    """Whether the `expand_kv` of a class does what the head of this file says, tried on a small stand-in."""
    function = getattr(cls, _SEAM)
    if list(signature(function).parameters) != ["self", "kv_nope", "k_rot"]:
        return False
    heads, rank, widths = 2, 5, _Widths(nope=3, rot=2, value=4)

    def example(*shape: int) -> torch.Tensor:
        # No random numbers: the sequence that a user has seeded stays the same.
        count = torch.Size(shape).numel()
        return torch.arange(1, count + 1, dtype=torch.float64, device="cpu").sin().view(shape)

    weight = example(heads * (widths.nope + widths.value), rank)
    stand_in = SimpleNamespace(
        kv_b_proj=lambda latents: torch.nn.functional.linear(latents, weight),
        num_heads=heads,
        kv_lora_rank=rank,
        qk_nope_head_dim=widths.nope,
        qk_rope_head_dim=widths.rot,
        qk_head_dim=widths.nope + widths.rot,
        v_head_dim=widths.value,
    )
    latents, rotary = example(2, 1, 3, rank), example(2, 1, 3, widths.rot)
    weights = weight.view(heads, -1, rank)
    key_weight, value_weight = weights[:, : widths.nope], weights[:, widths.nope :]
    expected = (
        torch.cat([latents @ key_weight.transpose(1, 2), rotary.expand(-1, heads, -1, -1)], -1),
        latents @ value_weight.transpose(1, 2),
    )
    try:
        actual = function(stand_in, latents.clone(), rotary.clone())
        return all(map(torch.allclose, actual, expected))
    # Whatever a method misses in the stand-in, it is not the method known here.
    except Exception:
        return False


def _unknown_weights(module: Any) -> str | None:
    """Returns why the weights of the expansion cannot be read past their module, `None` if they can."""
    projection = module.kv_b_proj
    kind = type(projection)
    if kind is not torch.nn.Linear:
        return f"its kv_b_proj is a {kind.__name__}"
    if projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection):
        return "its kv_b_proj has hooks"
    weight, widths = projection.weight, _widths(module)
    if type(weight) not in PLAIN_TYPES or weight.layout != torch.strided or not weight.is_floating_point():
        return "its kv_b_proj has weights of another kind"
    if projection.bias is not None:
        return "its kv_b_proj has a bias"
    if weight.shape[0] % (widths.nope + widths.value):
        return "its kv_b_proj has another shape"
    return None


def _expanding_reason(module: Any, widest: int) -> str | None:
    if not callable(getattr(type(module), _SEAM, None)):
        return f"its class has no {_SEAM}"
    # A pickle of a patched model holds the method of the class.
    own = getattr(vars(module).get(_SEAM), "__func__", None)
    if _SEAM in vars(module) and own not in (expand_kv, getattr(type(module), _SEAM)):
        return f"something else has replaced its {_SEAM}"
    if not _expands_as_described(type(module)):  # type: ignore[arg-type] # classes are hashable
        return f"its {_SEAM} is not the usual one"
    if module.kv_lora_rank + module.qk_rope_head_dim > widest:
        return f"kv_lora_rank + qk_rope_head_dim is above {widest}"
    reason = _unknown_weights(module)
    if reason is None and (device := module.kv_b_proj.weight.device.type) != "cpu":
        return f"on device {device}"
    return reason


class Latents:
    """The latents of one call, and what their expansion would be.

    Attributes:
        module: The module of attention.
        kv_nope: `[B, 1, T, R]`, what keys and values are formed of.
        k_rot: `[B, 1, T, P]`, the rotary part of the keys.
    """

    def __init__(self, module: torch.nn.Module, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> None:
        """Takes what `expand_kv` was called with."""
        self.module: Any = module
        self.kv_nope = kv_nope
        self.k_rot = k_rot
        self._states: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def are_expanded(self) -> bool:
        """Whether other code holds the keys and values. It may have written to them, so that they count."""
        return self._states is not None

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys `[B, H, T, N + P]` and values `[B, H, T, V]`, expanded at most once."""
        if self._states is None:
            self._states = getattr(type(self.module), _SEAM)(self.module, self.kv_nope, self.k_rot)
        return self._states

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of the keys and of the values."""
        widths = _widths(self.module)
        heads = self.module.kv_b_proj.weight.shape[0] // (widths.nope + widths.value)
        batch, _, tokens, _ = self.kv_nope.shape
        lead = (batch, heads, tokens)
        return (*lead, widths.nope + widths.rot), (*lead, widths.value)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `W_K`, `[H, N, R]`, and `W_V`, `[H, V, R]`: views of the weights of the moment."""
        widths = _widths(self.module)
        each = widths.nope + widths.value
        weight = self.module.kv_b_proj.weight.unflatten(0, (-1, each))
        return weight[:, : widths.nope], weight[:, widths.nope :]

    def absorb(self, query: torch.Tensor, visible: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the arguments of attention on the latents.

        Args:
            query: `[B, H, S, N + P]`.
            visible: How many of the latents to attend to.

        Returns:
            Queries `[B, H, S, R + P]`, keys `[B, 1, visible, R + P]` and values `[B, 1, visible, R]`, which are
            columns of the keys.
        """
        batch, heads, count, _ = query.shape
        nope, rank = _widths(self.module).nope, self.kv_nope.shape[3]
        # Heads, not batch rows, are the batch of the product: otherwise the weights would be copied for each.
        lifted = query[..., :nope].transpose(0, 1).reshape(heads, batch * count, nope)
        lifted = torch.bmm(lifted, self._weights()[0]).view(heads, batch, count, rank)
        rows = _side_by_side(self.kv_nope[:, :, :visible], self.k_rot[:, :, :visible])
        absorbed = query.new_empty((batch, heads, count, rows.shape[3]))
        absorbed[..., :rank].copy_(lifted.transpose(0, 1))
        absorbed[..., rank:].copy_(query[..., nope:])
        return absorbed, rows, rows[..., :rank]

    def release(self, output: torch.Tensor) -> torch.Tensor:
        """Returns the output of attention, `[B, S, H, V]`, from that on the latents, `[B, S, H, R]`."""
        batch, count, heads, rank = output.shape
        columns = output.permute(2, 3, 0, 1).reshape(heads, rank, batch * count)
        # The weights are on the left: with bfloat16, PyTorch's product with their transpose takes 7 times as long.
        values = torch.bmm(self._weights()[1], columns)
        return values.permute(2, 0, 1).reshape(batch, count, heads, -1)


def _side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns rows of two tensors as one tensor, without a copy where they are columns of the same rows."""
    if second.shape[3] == 0:
        return first
    shape = (*first.shape[:3], first.shape[3] + second.shape[3])
    strides = zip(first.shape, first.stride(), second.stride(), strict=True)
    if (
        all(size == 1 or one == other for size, one, other in tuple(strides)[:3])
        and first.stride(3) == second.stride(3) == 1
        and first.storage_offset() + first.shape[3] == second.storage_offset()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    ):
        return first.as_strided(shape, first.stride(), first.storage_offset())
    return torch.cat([first, second], -1)


class LatentStates(torch.Tensor):
    """Keys or values of a latent cache: any operator of torch gets the expanded tensor.

    Attributes:
        latents: What they are expanded from.
        part: 0 for keys, 1 for values.
    """

    latents: Latents
    part: int

    @staticmethod
    def __new__(cls: type[LatentStates], latents: Latents, part: int) -> LatentStates:
        """Returns a tensor of the shape of the expanded one, without memory."""
        like = latents.kv_nope
        states: LatentStates = torch.Tensor._make_wrapper_subclass(
            cls, latents.shapes()[part], dtype=like.dtype, device=like.device
        )
        states.latents, states.part = latents, part
        return states

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs a function or a method on the expanded tensor; what it would look like is known without it."""
        del types
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(_expanded, args), **tree_map(_expanded, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # PyTorch declares it without its first argument
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Runs an operator that is called from outside Python on the expanded tensor."""
        del types
        return func(*tree_map(_expanded, args), **tree_map(_expanded, kwargs or {}))


_DESCRIPTIONS = frozenset(
    [
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("device", "dtype", "ndim", "requires_grad", "shape")
        ),
        *(getattr(torch.Tensor, name) for name in ("__len__", "dim", "size")),
    ]
)


def _expanded(states: Any) -> Any:
    return states.latents.states()[states.part] if isinstance(states, LatentStates) else states


def expanded(call: Call) -> Call:
    """Returns a call with keys and values that are ordinary tensors."""
    return call._replace(key=_expanded(call.key), value=_expanded(call.value))


def _takes_fewer_operations(*, queries: int, tokens: int, rank: int, widths: _Widths) -> bool:
    """Whether attention on the latents takes fewer multiply-adds than on expanded keys and values.

    Of one head, with `N`, `P`, `V` columns, a latent of `R`, `S` queries and `T` tokens::

        expanded: T (N + V) R      [expansion]               + S T (N + P + V)  [scores, output]
        absorbed: S (N + V) R      [query in, output out]    + S T (2 R + P)

    For the sizes of DeepSeek-V3 (128, 64, 128; 512) and many tokens these are equal at 170 queries; times were
    measured to be equal between 128 and 256 (16 heads, 4,096 tokens, Zen 4, bfloat16 and float32). Prompts are
    expanded, unless `2 R < N + V`.
    """
    columns = widths.nope + widths.value
    expanding = tokens * columns * rank + queries * tokens * (columns + widths.rot)
    return queries * columns * rank + queries * tokens * (2 * rank + widths.rot) < expanding


def latents_to_read(call: Call) -> Latents | None:
    """Returns the latents of a call that attention is to read as they are.

    Returns:
        `None` for ordinary keys and values, where the expanded ones are in use already, and for so many queries
        that expanding takes fewer operations.
    """
    if type(call.key) is not LatentStates or type(call.value) is not LatentStates:
        return None
    latents, query = call.key.latents, call.query
    if (
        call.value.latents is not latents
        or (call.key.part, call.value.part) != (0, 1)
        or latents.are_expanded
    ):
        return None
    if query.ndim != _RANK or query.dtype != call.key.dtype:
        return None
    batch, heads, tokens, width = call.key.shape
    if (query.shape[0], query.shape[1], query.shape[3]) != (batch, heads, width):
        return None
    fewer = _takes_fewer_operations(
        queries=query.shape[2], tokens=tokens, rank=latents.kv_nope.shape[3], widths=_widths(latents.module)
    )
    return latents if fewer else None


def _can_wait(module: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> bool:
    """Whether the expansion may be put off: subquad is asked next, and nobody records what is computed."""
    if torch.compiler.is_compiling() or is_tracing(kv_nope) or is_tracing(k_rot):
        return False
    # A copy of a patched model, or one whose implementation was set since, asks another function.
    if module.config._attn_implementation != NAME:
        return False
    if torch.is_autocast_enabled("cpu") or _unknown_weights(module) is not None:
        return False
    weight = module.kv_b_proj.weight
    tensors = (kv_nope, k_rot, weight)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    if any(one.device.type != "cpu" or one.dtype != weight.dtype for one in tensors):
        return False
    widths = _widths(module)
    return (
        kv_nope.ndim == k_rot.ndim == _RANK
        and kv_nope.numel() > 0
        and kv_nope.shape[:3] == k_rot.shape[:3]
        and (kv_nope.shape[1], kv_nope.shape[3], k_rot.shape[3]) == (1, weight.shape[1], widths.rot)
    )


# The name is the seam's: a pickled bound method is looked up by it, and finds the module's own again.
def expand_kv(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shadows the method of a module of attention.

    Args:
        self: The module.
        kv_nope: `[B, 1, T, R]`.
        k_rot: `[B, 1, T, P]`.

    Returns:
        Keys `[B, H, T, N + P]` and values `[B, H, T, V]`: `LatentStates`, or what the module's own method
        returns.
    """
    if not _can_wait(self, kv_nope, k_rot):
        states: tuple[torch.Tensor, torch.Tensor] = getattr(type(self), _SEAM)(self, kv_nope, k_rot)
        return states
    latents = Latents(self, kv_nope, k_rot)
    return LatentStates(latents, 0), LatentStates(latents, 1)


def _is_in_use(module: torch.nn.Module) -> bool:
    own = vars(module).get(_SEAM)
    return isinstance(own, MethodType) and own.__func__ is expand_kv


def read_latents(module: torch.nn.Module, widest: int) -> str | None:
    """Lets a module of multi-head latent attention put off the expansion of its cache.

    This sets one attribute of this one module, which shadows a method of its class. Calls with gradients, on
    other devices, under autocast and within `torch.compile` still run that method.

    Args:
        module: The module; `is_latent` must hold.
        widest: The most columns that a head of keys may have.

    Returns:
        Why the module was left alone, `None` if it was not.
    """
    reason = _expanding_reason(module, widest)
    if reason is None and not _is_in_use(module):
        setattr(module, _SEAM, MethodType(expand_kv, module))
    return reason


def expand_again(module: torch.nn.Module) -> None:
    """Undoes `read_latents`; does nothing where it did nothing."""
    if _is_in_use(module):
        delattr(module, _SEAM)
