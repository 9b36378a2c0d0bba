"""`override_sdpa`: subquad in the place of `torch.nn.functional.scaled_dot_product_attention`.

The attribute of `torch.nn.functional` is replaced, and nothing else. The alternatives reach more callers, and
are not sound:

- A kernel of our own for `aten::scaled_dot_product_attention` on CPU disables the operator's autograd, which
  is derived from the composite that it would replace. One for the operator that this composite calls,
  `aten::_scaled_dot_product_flash_attention_for_cpu`, depends on an internal schema, and the calls that
  PyTorch computes by the formula never get there.
- A `TorchFunctionMode` sees the calls of one thread, and costs every other operator a microsecond.
- By `torch._C._nn.scaled_dot_product_attention` PyTorch's own nested tensors recognise the operator.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it

from subquad import _runtime
from subquad.ops.exact import scaled_dot_product_attention
from subquad.torch.library import autocast
from subquad.torch.plain import why_not_plain

_NAME = "scaled_dot_product_attention"
_ROUTE = "_subquad_route"
# What subquad documents that it raises: such a call is PyTorch's to compute, or to refuse in its own words.
_REFUSALS = (ValueError, TypeError, NotImplementedError, OverflowError)
# Refusals name shapes; a model that runs for days must not fill memory with them.
_MAX_REASONS = 64
_OTHER = "other reasons"

_lock = threading.Lock()


@dataclass
class _Tally:
    """Counts of one block; `_lock` guards them."""

    active: bool = True
    computed: int = 0
    delegated: Counter[str] = field(default_factory=Counter)
    compiled: bool = False


@dataclass(frozen=True)
class Report:
    """A snapshot of what became of the calls of a block. `str()` gives it as text.

    Attributes:
        active: Whether the block was still running.
        computed: Calls that subquad computed.
        delegated: Calls that went on to PyTorch's function, by reason, most frequent first.
        compiled: Whether `torch.compile` traced a call: compiled code calls PyTorch's function, uncounted.
    """

    active: bool
    computed: int
    delegated: Mapping[str, int]
    compiled: bool

    def __str__(self) -> str:
        """Returns the report as a few lines of text."""
        lines = [f"{_NAME}: {'overridden' if self.active else 'no longer overridden'} by subquad"]
        lines.append(f"  computed by subquad: {self.computed:,}")
        lines += [f"  delegated to torch: {count:,}: {reason}" for reason, count in self.delegated.items()]
        if self.compiled:
            lines.append("  torch.compile: calls in compiled code are delegated to torch, uncounted")
        return "\n".join(lines)


class Override:
    """What `override_sdpa` gives to its block."""

    def __init__(self, tally: _Tally) -> None:
        """Reads `tally`; made by `override_sdpa`."""
        self._tally = tally

    def report(self) -> Report:
        """Returns what subquad computed so far, and what PyTorch did and why. Valid after the block, too."""
        tally = self._tally
        with _lock:
            delegated = dict(tally.delegated.most_common())
            return Report(tally.active, tally.computed, delegated, tally.compiled)


@dataclass(slots=True)
class _Call:
    """PyTorch's arguments by name."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = field(default=None, kw_only=True)
    enable_gqa: bool = field(default=False, kw_only=True)


def _compute(call: _Call) -> torch.Tensor | str:
    """Returns the result, or why it is PyTorch's to compute."""
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    reason = why_not_plain((query, key, value) if mask is None else (query, key, value, mask))
    if reason is not None:
        return reason
    if torch.is_autocast_enabled("cpu"):
        query, key, value, mask = (autocast(tensor) for tensor in (query, key, value, mask))
    try:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            call.dropout_p,
            call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )
    except _REFUSALS as error:
        return f"subquad refuses it: {str(error).splitlines()[0]}"


def _count(tallies: tuple[_Tally, ...], reason: str | None) -> None:
    with _lock:
        for tally in tallies:
            if reason is None:
                tally.computed += 1
            else:
                known = reason in tally.delegated or len(tally.delegated) < _MAX_REASONS
                tally.delegated[reason if known else _OTHER] += 1


class _Route:
    """A function that stands in the place of another, and the blocks that count its calls."""

    def __init__(self, original: Callable[..., torch.Tensor]) -> None:
        self.original = original
        # Replaced as a whole, never changed: calls read it without a lock.
        self.tallies: tuple[_Tally, ...] = ()
        self.function = self._make_function()

    def _make_function(self) -> Callable[..., torch.Tensor]:
        original = self.original

        # The very arguments go on: PyTorch before 2.5 has no `enable_gqa`, and errors are the original's.
        def routed(*args: Any, **kwargs: Any) -> torch.Tensor:
            tallies = self.tallies
            if torch.compiler.is_compiling():
                for tally in tallies:
                    tally.compiled = True
                return original(*args, **kwargs)
            if not tallies:
                return original(*args, **kwargs)
            try:
                call = _Call(*args, **kwargs)
            except TypeError:
                call = None
            if call is None:
                return original(*args, **kwargs)
            result = _compute(call)
            if isinstance(result, str):
                _count(tallies, result)
                return original(*args, **kwargs)
            _count(tallies, None)
            return result

        routed.__name__ = routed.__qualname__ = _NAME
        routed.__doc__ = original.__doc__
        setattr(routed, _ROUTE, self)
        return routed


def _attach(tally: _Tally) -> _Route:
    """Puts a route in place, unless one is."""
    with _lock:
        current = getattr(F, _NAME)
        route = getattr(current, _ROUTE, None)
        # A wrapper made with `functools.wraps` has the attributes of what it wraps.
        if not isinstance(route, _Route) or route.function is not current:
            route = _Route(current)
            setattr(F, _NAME, route.function)
        route.tallies += (tally,)
        return route


def _detach(route: _Route, tally: _Tally) -> None:
    """Puts the original back after the last block, unless somebody has replaced the route."""
    with _lock:
        tally.active = False
        route.tallies = tuple(one for one in route.tallies if one is not tally)
        if not route.tallies and getattr(F, _NAME) is route.function:
            setattr(F, _NAME, route.original)


@contextmanager
def override_sdpa() -> Iterator[Override]:
    """Computes `torch.nn.functional.scaled_dot_product_attention` with subquad, within a `with` block.

    For models that call the function themselves (timm, diffusers); those of transformers are the business of
    `subquad.hf.patch`.

        with subquad.torch.override_sdpa() as override:
            model(x)
        print(override.report())

    What subquad does not compute goes on to PyTorch's function with the same arguments, and is counted by
    reason: tensors that are on another device, sparse, nested, fake, of a subclass, or a negated view;
    dtypes other than float32, float64, float16 and bfloat16; heads wider than 1024; `torch.compile`,
    `torch.jit.trace`, `torch.func` transforms, forward-mode differentiation, torch function modes and dispatch
    modes. Under autocast, inputs are cast as PyTorch casts them. What `torch.nn.attention.sdpa_kernel` chooses
    concerns PyTorch's function only. What subquad computes can be differentiated. Dropout takes its
    seed from PyTorch's generator, but drops other weights than PyTorch does.

    What is replaced is the attribute of `torch.nn.functional`, for all threads. Not reached are modules that
    hold the function itself, by `from torch.nn.functional import scaled_dot_product_attention` before the
    block; scripted modules; and the fused path that `torch.nn.TransformerEncoderLayer` and
    `torch.nn.MultiheadAttention` take in eval mode, which does not call the function. Inside the block,
    `torch.jit.script` cannot compile a call of the function.

    When the last of nested or concurrent blocks ends, by an exception or not, the very same object is put
    back. If somebody else has replaced the attribute meanwhile, theirs stays in place; if it wraps subquad's
    function, that one calls the original from then on.

    Yields:
        An `Override`, whose `report()` says how many calls were computed and how many delegated, and why.

    Raises:
        ValueError: if an environment variable of subquad has no valid value.
    """
    # Within a call, its error would look like a refusal.
    _runtime.config()
    tally = _Tally()
    route = _attach(tally)
    try:
        yield Override(tally)
    finally:
        _detach(route, tally)
