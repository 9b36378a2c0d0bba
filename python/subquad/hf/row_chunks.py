"""Modules that treat every token by itself, run on long inputs in chunks of tokens.

The gated MLP of a prompt of 32,000 tokens and RMSNorm, which works in float32, otherwise make tensors several times as large
as their input: these fill memory, and every operator reads them from there. Those of a chunk stay in the cache of the
processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from threading import RLock
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.activations import ACT2CLS

from subquad.hf.tracing import is_tracing

_SEAM = "forward"
# Elements of a chunk of a norm: 4 MiB in float32. Half as many take as long, and wait for all threads twice as often.
_NORM_ELEMENTS = 1 << 20
# Tokens of a chunk of matrix products, which pack their weights anew for each chunk.
_MLP_ROWS = 2048
# All that the usual RMSNorms refer to.
_NORM_NAMES = frozenset(
    {"_norm", "dtype", "eps", "float", "float32", "mean", "pow", "rsqrt", "sqrt", "to", "torch", "type_as"}
    | {"variance_epsilon", "weight"}
)
_ACTIVATIONS = frozenset(kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values())
# Bfloat16 products of one row and of several may be rounded differently.
_TOLERANCE = 0.02

_lock = RLock()
_uses: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _codes(module: nn.Module) -> list[CodeType]:
    """Returns the code of `forward` and of the norm it may call; nothing where that is not all that runs."""
    cls = type(module)
    functions = [cls.forward, getattr(cls, "_norm", None)]
    found = [one.__code__ for one in functions if isinstance(one, FunctionType)]
    plain = isinstance(cls.forward, FunctionType) and not hasattr(cls.forward, "__wrapped__")
    return found if plain and found[0].co_argcount == 2 and not found[0].co_kwonlyargcount else []


def _has(found: Iterator[object]) -> bool:
    return next(found, None) is not None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or _SEAM in vars(module))


def _is_plain_child(child: nn.Module) -> bool:
    """Whether a module in an MLP treats every row by itself and nothing watches its calls."""
    if _hooked(child):
        return False
    if type(child) is nn.Linear:
        # Quantised weights may scale all rows of an input alike.
        return type(child.weight) is nn.Parameter
    return type(child) in _ACTIVATIONS and not _has(child.parameters()) and not _has(child.buffers())


def _looks_like_norm(module: nn.Module, names: set[str]) -> bool:
    parameters = dict(module.named_parameters())
    return (
        names <= _NORM_NAMES
        and "mean" in names
        and parameters.keys() == {"weight"}
        and parameters["weight"].ndim == 1
        and not _has(module.children())
    )


def _looks_like_mlp(module: nn.Module, names: set[str]) -> bool:
    children = dict(module.named_children())
    return (
        names <= children.keys()
        and not _has(module.parameters(recurse=False))
        and any(type(child) is nn.Linear for child in children.values())
        and all(map(_is_plain_child, children.values()))
    )


def _width(module: nn.Module) -> int:
    linear = next((child for child in module.children() if type(child) is nn.Linear), None)
    return linear.in_features if linear is not None else len(next(module.parameters()))


def _treats_rows_alone(module: nn.Module) -> bool:
    """Tries whether the result of a row depends on that row alone."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, _width(module), generator=generator).to(weight.dtype)
    forward = type(module).forward
    with torch.no_grad():
        whole = forward(module, states)
        apart = [forward(module, row[None, None]) for row in states.flatten(0, 1)]
    if type(whole) is not torch.Tensor or whole.shape[:2] != states.shape[:2]:
        return False
    difference = (torch.cat(apart).view_as(whole) - whole).abs().max()
    return bool(difference <= _TOLERANCE * whole.abs().max())


def _qualifies(module: nn.Module) -> bool:
    codes = _codes(module)
    if not codes or any(one.device.type != "cpu" for one in module.parameters()):
        return False
    names = {name for code in codes for name in code.co_names}
    if not (_looks_like_norm(module, names) or _looks_like_mlp(module, names)):
        return False
    try:
        return _treats_rows_alone(module)
    except Exception:
        # Whatever it raises, it takes other inputs than rows.
        return False


def _as_rows(states: torch.Tensor) -> tuple[torch.Tensor, list[int]] | None:
    """Returns states as `[rows, width]` in the order of memory, and that order of the axes; `None` if there are gaps."""
    strides = states.stride()
    order = [*sorted(range(states.ndim - 1), key=strides.__getitem__, reverse=True), states.ndim - 1]
    ordered = states.permute(order)
    return (ordered.view(-1, states.shape[-1]), order) if ordered.is_contiguous() else None


def _runs_whole(module: nn.Module, states: torch.Tensor, chunk: int) -> bool:
    """Whether chunks are not worth it, or would not be the same."""
    children = list(module.children())
    return (
        states.numel() <= chunk * states.shape[-1]
        or torch.is_grad_enabled()
        or is_tracing(states)
        or states.device.type != "cpu"
        or not all(map(_is_plain_child, children))
        # The result of a matrix product is contiguous, whatever its input is.
        or (bool(children) and not states.is_contiguous())
    )


def _in_chunks(module: Any, states: torch.Tensor) -> torch.Tensor:
    """Returns what the `forward` of a module's class does, in chunks where they are of use.

    Args:
        module: The module.
        states: `[..., width]`, of rank 2 at least.
    """
    whole = type(module).forward
    chunk = _MLP_ROWS if _has(module.children()) else max(1, _NORM_ELEMENTS // max(1, states.shape[-1]))
    found = None if _runs_whole(module, states, chunk) else _as_rows(states)
    if found is None:
        result: torch.Tensor = whole(module, states)
        return result
    rows, order = found
    first = whole(module, rows[:chunk])
    result = first.new_empty((len(rows), first.shape[-1]))
    result[:chunk] = first
    for start in range(chunk, len(rows), chunk):
        result[start : start + chunk] = whole(module, rows[start : start + chunk])
    inverse = sorted(range(states.ndim), key=order.__getitem__)
    return result.view(*(states.shape[axis] for axis in order[:-1]), -1).permute(inverse)


# The name is the seam's: a pickled bound method is looked up by it, and finds the module's own again.
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the `forward` of a module's class, on a long input in chunks of tokens."""
    if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
        states = args[0]
        if type(states) is torch.Tensor and states.ndim > 1:
            return _in_chunks(self, states)
    return type(self).forward(self, *args, **kwargs)


def _is_in_use(module: nn.Module) -> bool:
    seam = vars(module).get(_SEAM)
    return isinstance(seam, MethodType) and seam.__func__ is forward


def _find(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of a model that qualify. One of each class and width is tried out."""
    known: dict[tuple[type, int], bool] = {}
    for module in model.modules():
        if _SEAM in vars(module):
            if _is_in_use(module):
                yield module
            continue
        if not _has(module.parameters()) or not _codes(module):
            continue
        key = type(module), sum(one.numel() for one in module.parameters())
        if key not in known:
            known[key] = _qualifies(module)
        if known[key] and all(map(_is_plain_child, module.children())):
            yield module


class RowChunks:
    """That modules of a model run long inputs in chunks: what `use_row_chunks` returns.

    Attributes:
        counts: How many modules, by class name.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        """Records what `use_row_chunks` has done."""
        self.counts = Counter(type(module).__name__ for module in modules)
        self._modules = modules

    def undo(self) -> None:
        """Makes the modules run as they did. A second call does nothing.

        Where a module was covered several times, this takes as many calls, in whatever order.
        """
        with _lock:
            modules, self._modules = self._modules, []
            for module in modules:
                left = _uses.pop(module, 1) - 1
                if left > 0:
                    _uses[module] = left
                elif _is_in_use(module):
                    delattr(module, _SEAM)


def use_row_chunks(model: nn.Module) -> RowChunks:
    """Makes the RMSNorms and MLPs of a model run long inputs in chunks of tokens.

    This sets one attribute of each such module, `forward`, which shadows the method of its class. Covered are modules that hold one
    weight and compute the usual RMSNorm, and those that hold linear layers and activations and do nothing but
    call them, add and multiply; of each class one is tried out. Where something else has set `forward`, where
    anything hooks into the layers of an MLP, in grad mode, while traced and for tensor subclasses, they run as
    they did.

    Every token has the result it had. The last bit may differ where PyTorch's own kernels depend on the number
    of rows.

    Returns:
        What undoes it.
    """
    with _lock:
        modules = list(_find(model))
        for module in modules:
            _uses[module] = _uses.get(module, 0) + 1
            if not _is_in_use(module):
                setattr(module, _SEAM, MethodType(forward, module))
        return RowChunks(modules)
