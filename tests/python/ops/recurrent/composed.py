"""The operators that are composed around a call of the engine, in one table: their inputs, states, oracles and calls.

Inputs and states are those of the oracles; calls turn them into what the operators take, and results back.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from subquad import ops
from subquad.reference import recurrent as oracles

from .cases import DTYPES, Draw, Problem, Sizes, about, accumulator, check, wide

Arrays = dict[str, Any]
States = tuple[Any, ...]
Found = tuple[Any, States]

# Slots of gated slot attention.
SLOTS = 5
COMPLEX = {
    "float64": np.complex128,
    "float32": np.complex64,
    "float16": np.complex64,
    "bfloat16": np.complex64,
}
# What is of the accumulators' type whatever the inputs are, and what may be.
PARAMETERS = ("A", "D", "dt_bias")
BESIDE = ("g", "i", "f", "dt")


def _sizes_of_keys(draw: Draw) -> tuple[int, int, int]:
    return draw.sizes.batch, draw.sizes.tokens, draw.sizes.heads


def _slots(draw: Draw) -> Arrays:
    s = draw.sizes
    q = draw.normal(s.batch, s.tokens, s.value_heads, s.keys)
    k, v, slots = (draw.normal(*_sizes_of_keys(draw), n) for n in (s.keys, s.values, SLOTS))
    return {"q": q, "k": k, "v": v, "s": slots}


def _gated_slots(draw: Draw) -> Arrays:
    gates = -np.logaddexp(0.0, -3.0 * draw.normal(*_sizes_of_keys(draw), SLOTS))
    return {**_slots(draw), "g": gates}


def _states_of_slots(draw: Draw, count: int) -> States:
    s = draw.sizes
    return draw.normal(count, s.heads, s.keys, SLOTS), draw.normal(count, s.heads, SLOTS, s.values)


def _call_slots(
    function: Callable[..., Any], inputs: Arrays, states: States | None, options: Arrays
) -> Found:
    o, finals = function(**inputs, initial_state=states, **{"output_final_state": True, **options})
    return o, finals or ()


def _states_of_averages(draw: Draw, count: int) -> States:
    s = draw.sizes
    return draw.normal(count, s.heads, s.keys, s.values), draw.normal(count, 1, s.heads, s.keys)


def _call_averages(
    function: Callable[..., Any], inputs: Arrays, states: States | None, options: Arrays
) -> Found:
    o, (final, z) = function(**inputs, initial_state=states, **{"output_final_state": True, **options})
    return o, () if final is None else (final, z)


def _turning(draw: Draw) -> Arrays:
    phases = draw.uniform(-np.pi, np.pi, *_sizes_of_keys(draw), draw.sizes.keys)
    lengths = np.exp(draw.gates(draw.sizes.keys))
    return {"q": draw.queries(), "k": draw.queries(), "v": draw.values(), "a": lengths * np.exp(1j * phases)}


def _complex_states(draw: Draw, count: int) -> States:
    shape = (count, draw.sizes.heads, draw.sizes.keys, draw.sizes.values)
    return (draw.normal(*shape) + 1j * draw.normal(*shape),)


def _call_turning(
    function: Callable[..., Any], inputs: Arrays, states: States | None, options: Arrays
) -> Found:
    initial = None if states is None else states[0]
    o, final = function(**inputs, initial_state=initial, **{"output_final_state": True, **options})
    return o, () if final is None else (final,)


def _remembered(draw: Draw) -> Arrays:
    q, k, v = draw.queries(), draw.queries(), draw.values()
    # Input gates are moderate: where they are large, denominators are what is left of sums that cancel.
    write, forget = draw.normal(*_sizes_of_keys(draw)), 3.0 * draw.normal(*_sizes_of_keys(draw))
    return {"q": q, "k": k, "v": v, "i": write, "f": forget}


def _memories(draw: Draw, count: int) -> States:
    s = draw.sizes
    shapes = ((s.heads, s.keys, s.values), (s.heads, s.keys), (s.heads,))
    return tuple(draw.normal(count, *shape) for shape in shapes)


def _call_mlstm(
    function: Callable[..., Any], inputs: Arrays, states: States | None, options: Arrays
) -> Found:
    turned = {name: x.swapaxes(1, 2) for name, x in inputs.items()}
    names = ("c_initial", "n_initial", "m_initial")
    initial = dict(zip(names, states or (), strict=False))
    if "m_initial" in initial:
        initial["m_initial"] = initial["m_initial"][..., None]
    found = function(**turned, **initial, **{"return_last_states": True, **options})
    h, finals = found if isinstance(found, tuple) else (found, ())
    finals = [x for x in finals if x is not None]
    if len(finals) == 3:
        finals[2] = finals[2][..., 0]
    return h.swapaxes(1, 2), tuple(finals)


def _scanned(draw: Draw) -> Arrays:
    s = draw.sizes
    of_heads = (s.batch, s.tokens, s.value_heads)
    b, c = draw.queries(), draw.queries()
    return {
        "x": draw.normal(*of_heads, s.values),
        "dt": draw.normal(*of_heads),
        "A": -np.exp(draw.normal(s.value_heads)),
        "B": b,
        "C": c,
        "D": draw.normal(s.value_heads),
        "z": draw.normal(*of_heads, s.values),
        "dt_bias": draw.normal(s.value_heads),
    }


def _scanned_alone(draw: Draw) -> Arrays:
    return {name: x for name, x in _scanned(draw).items() if name not in {"D", "z", "dt_bias"}}


def _states_of_scans(draw: Draw, count: int) -> States:
    s = draw.sizes
    return (draw.normal(count, s.value_heads, s.values, s.keys),)


def _call_scan(function: Callable[..., Any], inputs: Arrays, states: States | None, options: Arrays) -> Found:
    returned = "return_final_states" if options.get("cu_seqlens") is None else "return_varlen_states"
    options = {"chunk_size": 64, "initial_states": None if states is None else states[0], **options}
    found = function(**inputs, **{returned: options.pop("output_final_state", True), **options})
    return (found[0], found[1:]) if isinstance(found, tuple) else (found, ())


class Composed(NamedTuple):
    """An operator, in whatever form."""

    functions: tuple[str, ...]
    oracle: Callable[..., Any]
    draw: Callable[[Draw], Arrays]
    states: Callable[[Draw, int], States]
    call: Callable[..., Found]
    options: Mapping[str, Any] = {}
    # What the initial state is called, and the first of the inputs, which measures the others.
    state: str = "initial_state"
    first: str = "q"
    # Whether heads of keys may be fewer than those of queries or values.
    is_grouped: bool = False


_MLSTM = ("mlstm_chunkwise", "mlstm_recurrent")
_SIGING = ("mlstm_siging_chunkwise", "mlstm_siging_recurrent")
_GSA = ("chunk_gsa", "fused_recurrent_gsa")
FAMILIES = {
    "gsa": Composed(_GSA, oracles.gsa, _gated_slots, _states_of_slots, _call_slots, is_grouped=True),
    "abc": Composed(
        (*_GSA, "chunk_abc"), oracles.gsa, _slots, _states_of_slots, _call_slots, is_grouped=True
    ),
    "lightnet": Composed(
        ("chunk_lightnet", "fused_recurrent_lightnet"),
        oracles.lightnet,
        lambda draw: {"q": draw.queries(), "k": draw.queries(), "v": draw.values()},
        _states_of_averages,
        _call_averages,
    ),
    "gate_loop": Composed(
        ("chunk_gate_loop", "fused_recurrent_gate_loop"),
        oracles.gateloop,
        _turning,
        _complex_states,
        _call_turning,
    ),
    "mlstm": Composed(_MLSTM, oracles.mlstm, _remembered, _memories, _call_mlstm, state="c_initial"),
    "mlstm_siging": Composed(
        _SIGING,
        oracles.mlstm_sigmoid,
        _remembered,
        lambda draw, count: _memories(draw, count)[:1],
        _call_mlstm,
        {"normalize": False},
        "c_initial",
    ),
    "mlstm_siging normalized": Composed(
        _SIGING,
        oracles.mlstm_sigmoid,
        _remembered,
        lambda draw, count: _memories(draw, count)[:2],
        _call_mlstm,
        {"normalize": True},
        "c_initial",
    ),
    "ssd": Composed(
        ("mamba_chunk_scan_combined",),
        oracles.mamba_chunk_scan_combined,
        _scanned,
        _states_of_scans,
        _call_scan,
        {"dt_softplus": True},
        "initial_states",
        "x",
        is_grouped=True,
    ),
    "ssd alone": Composed(
        ("mamba_chunk_scan_combined",),
        oracles.mamba_chunk_scan_combined,
        _scanned_alone,
        _states_of_scans,
        _call_scan,
        {"dt_softplus": True},
        "initial_states",
        "x",
        is_grouped=True,
    ),
}
FORMS = {
    f"{function} {family}": (function, family)
    for family, named in FAMILIES.items()
    for function in named.functions
}
# One form of each family.
FIRST = {family: f"{named.functions[0]} {family}" for family, named in FAMILIES.items()}


def typed(name: str, x: np.ndarray, dtype: str, beside: str | None = None) -> np.ndarray:
    """Returns an input in the dtype that it has in a call of that dtype."""
    if np.iscomplexobj(x):
        return x.astype(COMPLEX[dtype])
    if name in PARAMETERS:
        return x.astype(DTYPES[accumulator(dtype)])
    return x.astype(DTYPES[beside if beside and name in BESIDE else dtype])


def draw_inputs(family: str, sizes: Sizes, dtype: str, *, seed: int = 0, beside: str | None = None) -> Arrays:
    """Returns the inputs of an operator by name, gates of another dtype if one is given."""
    drawn = FAMILIES[family].draw(Draw(sizes, seed))
    return {name: typed(name, x, dtype, beside) for name, x in drawn.items()}


def draw_states(
    family: str, sizes: Sizes, dtype: str, *, sequences: int | None = None, seed: int = 1
) -> States:
    """Returns the states before the first token."""
    count = sizes.batch if sequences is None else sequences
    states = FAMILIES[family].states(Draw(sizes, seed), count)
    return tuple(typed("", x, accumulator(dtype)) for x in states)


def _precise(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128) if np.iscomplexobj(x) else wide(x)


def expect(family: str, inputs: Arrays, states: States | None = None, **options: Any) -> Found:
    """Returns what the oracle says, outputs and states."""
    named = FAMILIES[family]
    initial: Any = None if states is None else tuple(_precise(x) for x in states)
    if initial is not None and len(initial) == 1:
        (initial,) = initial
    state = "initial_state" if named.state == "c_initial" else named.state
    precise = {name: _precise(x) for name, x in inputs.items()}
    o, final = named.oracle(**precise, **{state: initial}, **{**named.options, **options})
    return o, final if isinstance(final, tuple) else (final,)


def call(form: str, inputs: Arrays, states: States | None = None, **options: Any) -> Found:
    """Calls a public function; returns outputs and states, none where they are not asked for."""
    function, family = FORMS[form]
    named = FAMILIES[family]
    return named.call(getattr(ops, function), inputs, states, {**named.options, **options})


def check_found(found: Found, expected: Found, dtype: str) -> None:
    """Checks outputs and states; complex ones by their parts."""
    o, states = found
    assert len(states) == len(expected[1])
    parts = []
    for x in states:
        if "complex" in str(x.dtype):
            assert str(x.dtype).removeprefix("torch.") == np.dtype(COMPLEX[dtype]).name
            parts.append(np.stack([np.real(x), np.imag(x)]))
        else:
            parts.append(x)
    wanted = tuple(np.stack([x.real, x.imag]) if np.iscomplexobj(x) else x for x in expected[1])
    check((o, tuple(parts)), (expected[0], wanted), dtype)


@cache
def problem(family: str, sizes: Sizes, dtype: str, *, has_state: bool = True) -> Problem:
    """Returns the same problem whenever asked, as oracles take their time."""
    inputs, states = draw_inputs(family, sizes, dtype), draw_states(family, sizes, dtype)
    for x in (*inputs.values(), *states):
        x.setflags(write=False)
    return Problem(inputs, states, expect(family, inputs, states if has_state else None))


def solve(form: str, sizes: Sizes, dtype: str) -> None:
    """Calls a form on its problem and checks what it returns."""
    given = problem(FORMS[form][1], sizes, dtype)
    with about(form, sizes):
        check_found(call(form, given.inputs, given.states), given.expected, dtype)


def part(inputs: Arrays, start: int, stop: int) -> Arrays:
    """Returns the inputs from one token to another."""
    return {name: x if name in PARAMETERS else x[:, start:stop] for name, x in inputs.items()}
