"""Whether a model's own attention function computes what subquad does with the same arguments: it is tried out.

The names in its code tell for the usual function. Others, with sinks, soft-caps or a bias of positions, differ in how they are
written, and some ignore arguments: a small call shows what they do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from subquad.ops.exact import attention

_QUERIES, _KEYS = 3, 5
_PER_QUERY_RANK = 4
# Small enough to show.
_SOFTCAP, _WINDOW = 2.0, 2
# float32, and room for functions that round their softmax.
_TOLERANCE = 1e-4

# Arguments that change scores.
SEMANTIC = ("softcap", "s_aux", "sinks", "position_bias")
# Arguments that the usual functions ignore, since the mask has what they say: others might not.
_IN_THE_MASK = ("is_causal", "sliding_window")


class Extras(NamedTuple):
    """Arguments of a call that change scores.

    Attributes:
        softcap: The soft-cap.
        sinks: A logit of each head `[H]`, or of each query `[B, H, Sq]`.
        position_bias: What is added to scores, broadcastable to `[B, H, Sq, Sk]`.
    """

    softcap: float | None
    sinks: torch.Tensor | None
    position_bias: torch.Tensor | None


class _Key(NamedTuple):
    cls: type
    function: Any
    arguments: frozenset[tuple[str, str]]
    heads: tuple[int, ...]


_known: dict[_Key, bool] = {}


def _kind(module: torch.nn.Module, name: str, value: Any) -> str:
    """Returns what an argument is, as far as a trial depends on it."""
    if not isinstance(value, torch.Tensor):
        return f"{value}" if isinstance(value, bool) else type(value).__name__
    if any(value is one for one in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return "own"
    return "per query" if name == "sinks" and value.ndim > 1 else "foreign"


def _example(name: str, value: Any, kind: str, heads: int) -> Any:
    """Returns an argument of the trial like that of the call, which shows in the result if it is used."""
    per_query = (1, heads, _QUERIES)
    if name == "softcap":
        return _SOFTCAP
    if name == "sliding_window":
        return _WINDOW
    if name == "position_bias":
        return torch.linspace(-1.0, 1.0, heads * _QUERIES * _KEYS).reshape(*per_query, _KEYS)
    # A function may read a parameter of its module in place of the argument: the same, if the argument is that.
    if name not in SEMANTIC or kind == "own":
        return value
    if kind == "per query":
        return torch.linspace(-1.0, 1.0, heads * _QUERIES).reshape(*per_query, 1)
    return torch.linspace(-1.0, 1.0, heads)


def _tries(module: torch.nn.Module, function: Any, heads: tuple[int, ...], given: dict[str, Any]) -> bool:
    query_heads, key_heads, width, value_width = heads
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query = random(1, query_heads, _QUERIES, width)
    key, value = random(1, key_heads, _KEYS, width), random(1, key_heads, _KEYS, value_width)
    # Neither causal nor a window: a function that adds one of them is found out.
    hidden = (torch.arange(_QUERIES)[:, None] + torch.arange(_KEYS)) % 3 == 1
    mask = torch.zeros(1, 1, _QUERIES, _KEYS).masked_fill(hidden, torch.finfo(torch.float32).min)
    trial = {name: _example(name, one, _kind(module, name, one), query_heads) for name, one in given.items()}
    scaling = 1.5 * width**-0.5
    with torch.no_grad():
        found = function(module, query, key, value, mask, scaling=scaling, dropout=0.0, **trial)[0]
        extras = extras_of(trial)
        bias = mask if extras.position_bias is None else mask + extras.position_bias
        expected = attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scale=scaling,
            bias=bias,
            softcap=extras.softcap,
            sinks=None if extras.sinks is None else extras.sinks.float(),
        )
    return found.shape == expected.shape and bool(
        (found.float() - expected).abs().max() <= _TOLERANCE * expected.abs().max()
    )


def extras_of(kwargs: dict[str, Any]) -> Extras:
    """Returns the arguments that change scores, from those of a call."""
    sinks = kwargs.get("s_aux") if kwargs.get("sinks") is None else kwargs["sinks"]
    if sinks is not None and sinks.ndim == _PER_QUERY_RANK:
        sinks = sinks.squeeze(-1)
    return Extras(kwargs.get("softcap"), sinks, kwargs.get("position_bias"))


def computes_attention(
    module: torch.nn.Module, function: Any, heads: tuple[int, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether `function` gives `softmax(cap(scale q k^T) + mask + position_bias) v`, with sinks if there are any.

    Args:
        module: The module that calls attention.
        function: Its own attention function.
        heads: Query heads, key heads, width of keys, width of values.
        kwargs: The arguments of the call.
    """
    given = {name: kwargs[name] for name in (*SEMANTIC, *_IN_THE_MASK) if kwargs.get(name) is not None}
    kinds = frozenset((name, _kind(module, name, one)) for name, one in given.items())
    key = _Key(type(module), function, kinds, heads)
    known = _known.get(key)
    if known is None:
        try:
            known = _tries(module, function, heads, given)
        except Exception:
            # Whatever a foreign function raises, it is not what subquad computes.
            known = False
        _known[key] = known
    return known
