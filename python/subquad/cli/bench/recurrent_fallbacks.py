"""transformers' own functions for a CPU, which recurrent operators are measured beside.

They are looked up in the installed package, behind the decorators that put other packages' kernels in their place. Operators
that it has under no name of their own, but with a decay that the state space duality of Mamba-2 can express, are computed by
that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from subquad.cli.bench.recurrent_shape import RecurrentShape

Function = Callable[[Mapping[str, Any]], Any]

# What Mamba-2's models are configured to; where its function stands in for others, the chunk of transformers' delta rules.
_CHUNK_SIZE = 256
_SHORT_CHUNK_SIZE = 64


class Fallback(NamedTuple):
    """A function of transformers.

    Attributes:
        model: The model that has it.
        name: Its name.
        call: Calls it with inputs by the names of our arguments; returns the outputs, and the states if it makes some.
    """

    model: str
    name: str
    call: Callable[[Callable[..., Any], Mapping[str, Any]], Any]


def _delta(plain: Callable[..., Any], x: Mapping[str, Any]) -> Any:
    return plain(**_delta_arguments(x))


def _delta_step(plain: Callable[..., Any], x: Mapping[str, Any]) -> Any:
    return plain(**_delta_arguments(x), initial_state=x["initial_state"], output_final_state=True)


def _delta_arguments(x: Mapping[str, Any]) -> dict[str, Any]:
    g = x["g"] if "g" in x else x["beta"].new_zeros(x["beta"].shape)
    return {
        "query": x["q"],
        "key": x["k"],
        "value": x["v"],
        "g": g,
        "beta": x["beta"],
        "use_qk_l2norm_in_kernel": True,
    }


def _state_space(plain: Callable[..., Any], x: Mapping[str, Any]) -> Any:
    return plain(
        *(x[name] for name in ("x", "dt", "A", "B", "C")),
        chunk_size=_CHUNK_SIZE,
        D=x["D"],
        dt_bias=x["dt_bias"],
        dt_softplus=True,
    )


def _by_state_space(decays: Callable[[Any], Any]) -> Callable[[Callable[..., Any], Mapping[str, Any]], Any]:
    """Returns the call for linear attention.

    Args:
        decays: Returns logarithms of decays for the number of heads, `[H]`, as a tensor.
    """

    def call(plain: Callable[..., Any], x: Mapping[str, Any]) -> Any:
        q, k, v = x["q"], x["k"], x["v"]
        steps = v.new_ones(v.shape[:3])
        # Decays of each step are taken as well: they are only ever multiplied by the step sizes.
        rates = x["g"] if "g" in x else decays(v.shape[2])
        return plain(v, steps, rates, k, q * q.shape[-1] ** -0.5, chunk_size=_SHORT_CHUNK_SIZE)

    return call


def _none(heads: int) -> Any:
    import torch

    return torch.zeros(heads)


def _retention(heads: int) -> Any:
    import torch

    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))


def _lightning(heads: int) -> Any:
    import torch

    return -8.0 / heads * torch.arange(heads)


def _scan(plain: Callable[..., Any], x: Mapping[str, Any]) -> Any:
    return plain(
        *(x[name] for name in ("u", "delta", "A", "B", "C")),
        D=x["D"],
        z=x["z"],
        delta_bias=x["delta_bias"],
        delta_softplus=True,
    )


def _convolution(plain: Callable[..., Any], x: Mapping[str, Any]) -> Any:
    return plain(x["x"], x["weight"], activation="silu")


_FALLBACKS: Mapping[tuple[str, str], Fallback] = {
    ("gated_delta_rule", "chunk"): Fallback("qwen3_next", "torch_chunk_gated_delta_rule", _delta),
    ("gated_delta_rule", "step"): Fallback("qwen3_next", "torch_recurrent_gated_delta_rule", _delta_step),
    ("delta_rule", "chunk"): Fallback("qwen3_next", "torch_chunk_gated_delta_rule", _delta),
    ("kda", "chunk"): Fallback("kimi_linear", "chunk_kimi_delta_attention", _delta),
    ("kda", "step"): Fallback("kimi_linear", "recurrent_kimi_delta_attention", _delta_step),
    ("mamba2", "chunk"): Fallback("mamba2", "mamba2_chunk_scan", _state_space),
    ("linear_attn", "chunk"): Fallback("mamba2", "mamba2_chunk_scan", _by_state_space(_none)),
    ("simple_gla", "chunk"): Fallback("mamba2", "mamba2_chunk_scan", _by_state_space(_none)),
    ("retention", "chunk"): Fallback("mamba2", "mamba2_chunk_scan", _by_state_space(_retention)),
    ("lightning_attn", "chunk"): Fallback("mamba2", "mamba2_chunk_scan", _by_state_space(_lightning)),
    ("mamba", "chunk"): Fallback("mamba", "mamba_selective_scan", _scan),
    ("causal_conv1d", "chunk"): Fallback("qwen3_next", "causal_conv1d_fn", _convolution),
}


def _plain(fallback: Fallback) -> Callable[..., Any] | None:
    """Returns the function itself; `None` if there is no such function in the installed package."""
    try:
        module = import_module(f"transformers.models.{fallback.model}.modeling_{fallback.model}")
    except ImportError:
        return None
    found = getattr(module, fallback.name, None)
    if not callable(found):
        return None
    plain = inspect.unwrap(found)
    return plain if plain.__module__.partition(".")[0] == "transformers" else None


def find(shape: RecurrentShape) -> tuple[Function | None, str]:
    """Returns the fallback of an operator.

    Args:
        shape: Which operator, and in which form.

    Returns:
        A function that takes inputs by the names of our arguments, and returns the outputs (in form `"step"` also the
        state), or `None` and why there is none.
    """
    fallback = _FALLBACKS.get((shape.operator, "step" if shape.form == "step" else "chunk"))
    if fallback is None:
        return None, f"transformers has no fallback for {shape.operator}"
    if find_spec("transformers") is None:
        return None, "transformers is not installed: no fallbacks to compare with"
    plain = _plain(fallback)
    if plain is None:
        return None, f"the installed transformers has no {fallback.name} in {fallback.model}"

    def call(inputs: Mapping[str, Any]) -> Any:
        found = fallback.call(plain, inputs)
        return found[0] if shape.form != "step" and isinstance(found, tuple) else found

    return call, ""
