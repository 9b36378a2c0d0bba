"""Step sizes, as the engine makes gates and factors of them, in functions that PyTorch differentiates.

The engine takes `beta` for step sizes where `step_rates` is given: `s = clip(softplus(beta + step_bias))` is the factor of what is
written, `s * step_rates` the gate. Nothing for each token is in memory then but what the caller has.
"""

from __future__ import annotations

from math import inf
from typing import Any

from .elementwise import softplus
from .namespace import namespace_of

# The options of the engine that say what is made of step sizes, and what they are where they are not given.
_DEFAULTS: dict[str, Any] = {
    "step_rates": None,
    "step_bias": None,
    "step_softplus": False,
    "step_limits": (0.0, inf),
}


def _made(steps: Any, *, bias: Any | None, is_softplus: bool, limits: tuple[float, float]) -> Any:
    """Returns what is made of step sizes `[B, T, H]`: `clip(softplus(steps + bias))`, softplus only if it is asked for."""
    if bias is not None:
        steps = steps + bias
    if is_softplus:
        steps = softplus(steps)
    # What softplus has is within the usual limits.
    is_within = is_softplus and tuple(limits) == (0.0, inf)
    return steps if is_within else namespace_of("steps", steps).clip(steps, *limits)


def spelled_out(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options of the engine in which gates and factors are made of step sizes already."""
    if options.get("step_rates") is None:
        return options
    rates, bias, is_softplus, limits = (options.get(name, default) for name, default in _DEFAULTS.items())
    rest = {name: option for name, option in options.items() if name not in _DEFAULTS}
    steps = _made(options["beta"], bias=bias, is_softplus=is_softplus, limits=limits)
    return {**rest, "g": steps * rates, "beta": steps}
