"""The operators in one table, what they are tried on, and what they are compared with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from subquad import _native, ops
from subquad.reference import recurrent as oracles
from subquad.testing import assert_close

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
HALF = ("float16", "bfloat16")
# Errors in units of the largest expected magnitude, of what is not rounded to a half type.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5}
# Matrix tiles round what they multiply to bfloat16.
MULTIPLIES_BF16 = _native.config()["level"] == "amx"
# Of the root mean squares of error and expected output: the bar of flash-linear-attention.
RATIO = 0.005
# What may be of the accumulators' type beside half types.
BESIDE = ("g", "gk", "w", "u", "beta", "g_gamma")
# Keys for each token of the gated delta product.
PRODUCT = 3


class Sizes(NamedTuple):
    """Of a call."""

    batch: int = 2
    tokens: int = 65
    heads: int = 2
    value_heads: int = 2
    keys: int = 20
    values: int = 8


class Draw:
    """Draws float64 arrays of the shapes that operators take."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        self._generator = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        return self._generator.standard_normal(shape)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        return self._generator.uniform(low, high, shape)

    def queries(self, times: int = 1) -> np.ndarray:
        s = self.sizes
        return self.normal(s.batch, s.tokens * times, s.heads, s.keys)

    def unit(self, times: int = 1) -> np.ndarray:
        x = self.queries(times)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def of_values(self, *width: int, times: int = 1) -> tuple[int, ...]:
        s = self.sizes
        return (s.batch, s.tokens * times, s.value_heads, *width)

    def values(self, times: int = 1) -> np.ndarray:
        return self.normal(*self.of_values(self.sizes.values, times=times))

    def gates(self, *width: int) -> np.ndarray:
        """Log decays: log-sigmoids, from strong to weak."""
        return -np.logaddexp(0.0, -3.0 * self.normal(*self.of_values(*width)))

    def strengths(self, times: int = 1) -> np.ndarray:
        return self.uniform(0.0, 1.0, *self.of_values(times=times))


def _plain(draw: Draw) -> dict[str, np.ndarray]:
    return {"q": draw.queries(), "k": draw.queries(), "v": draw.values()}


def _positive(draw: Draw) -> dict[str, np.ndarray]:
    return {"q": np.exp(draw.queries() / 2), "k": np.exp(draw.queries() / 2), "v": draw.values()}


def _steps(draw: Draw) -> dict[str, np.ndarray]:
    return {**_plain(draw), "g": draw.gates()}


def _constants(draw: Draw) -> dict[str, np.ndarray]:
    return {**_plain(draw), "g_gamma": -np.exp(-draw.uniform(0.0, 6.0, draw.sizes.value_heads))}


def _channels(draw: Draw) -> dict[str, np.ndarray]:
    return {**_plain(draw), "gk": draw.gates(draw.sizes.keys)}


def _rwkv6(draw: Draw) -> dict[str, np.ndarray]:
    bonus = draw.normal(draw.sizes.heads, draw.sizes.keys)
    gates = draw.gates(draw.sizes.keys)
    return {"r": draw.queries(), "k": draw.queries(), "v": draw.values(), "w": gates, "u": bonus}


def _delta(draw: Draw) -> dict[str, np.ndarray]:
    return {"q": draw.queries(), "k": draw.unit(), "v": draw.values(), "beta": draw.strengths()}


def _gated_delta(draw: Draw) -> dict[str, np.ndarray]:
    return {**_delta(draw), "g": draw.gates()}


def _kda(draw: Draw) -> dict[str, np.ndarray]:
    return {**_delta(draw), "g": draw.gates(draw.sizes.keys)}


def _product(draw: Draw) -> dict[str, np.ndarray]:
    many = {"k": draw.unit(PRODUCT), "v": draw.values(PRODUCT), "beta": draw.strengths(PRODUCT)}
    return {"q": draw.queries(), **many, "g": draw.gates()}


def _iplr(draw: Draw) -> dict[str, np.ndarray]:
    removed = draw.unit()
    written = removed * draw.uniform(0.0, 1.0, *removed.shape)
    return {**_plain(draw), "a": -removed, "b": written}


def _dplr(draw: Draw) -> dict[str, np.ndarray]:
    return {**_iplr(draw), "gk": draw.gates(draw.sizes.keys)}


def _rwkv7(draw: Draw) -> dict[str, np.ndarray]:
    names = {"q": "r", "gk": "w"}
    return {names.get(name, name): x for name, x in _dplr(draw).items()}


@dataclass(frozen=True)
class Family:
    """An operator, whatever form it is computed in."""

    oracle: Callable[..., Any]
    draw: Callable[[Draw], dict[str, np.ndarray]]
    options: Mapping[str, Any] = field(default_factory=dict)
    # Inputs with several rows for each token.
    repeated: tuple[str, ...] = ()

    @property
    def is_normalized(self) -> bool:
        """Whether the state is a pair, of which the second is positive."""
        return bool(self.options.get("normalize"))

    @property
    def is_delta(self) -> bool:
        return self.oracle.__name__ in {"delta_rule", "gated_delta_rule", "kda", "gated_delta_product"}

    @property
    def queries(self) -> str:
        return "r" if self.oracle.__name__.startswith("rwkv") else "q"


FAMILIES = {
    "linear_attn": Family(oracles.linear_attn, _plain, {"normalize": False}),
    "normalized": Family(oracles.linear_attn, _positive, {"normalize": True}),
    "no decay": Family(oracles.simple_gla, _plain),
    "simple_gla": Family(oracles.simple_gla, _steps),
    "constant": Family(oracles.simple_gla, _constants),
    "retention": Family(oracles.retention, _plain),
    "lightning_attn": Family(oracles.lightning_attn, _plain, {"layer_idx": 1, "num_layers": 3}),
    "gla": Family(oracles.gla, _channels),
    "rwkv6": Family(oracles.rwkv6, _rwkv6),
    "delta_rule": Family(oracles.delta_rule, _delta),
    "gated_delta_rule": Family(oracles.gated_delta_rule, _gated_delta),
    "kda": Family(oracles.kda, _kda),
    "gated_delta_product": Family(
        oracles.gated_delta_product, _product, {"num_householder": PRODUCT}, ("k", "v", "beta")
    ),
    "dplr": Family(oracles.dplr_delta_rule, _dplr),
    "iplr": Family(oracles.iplr_delta_rule, _iplr),
    "rwkv7": Family(oracles.rwkv7, _rwkv7),
    "rwkv7 scaled": Family(oracles.rwkv7, _rwkv7, {"scale": None}),
}
# Heads of keys may be shared in these.
GROUPED = ("delta_rule", "gated_delta_rule", "kda")


class Form(NamedTuple):
    """A public function."""

    function: str
    family: str
    # What its arguments are called, where the oracle's have other names.
    names: Mapping[str, str] = {}
    # Whether states go in and out.
    has_state: bool = True

    @property
    def name(self) -> str:
        return f"{self.function} {self.family}"


FORMS = {
    form.name: form
    for form in (
        Form("chunk_linear_attn", "linear_attn"),
        Form("chunk_linear_attn", "normalized"),
        Form("fused_chunk_linear_attn", "linear_attn"),
        Form("fused_chunk_linear_attn", "normalized"),
        Form("fused_recurrent_linear_attn", "linear_attn"),
        Form("fused_recurrent_linear_attn", "normalized"),
        Form("chunk_simple_gla", "no decay"),
        Form("chunk_simple_gla", "simple_gla"),
        Form("chunk_simple_gla", "constant"),
        Form("fused_chunk_simple_gla", "simple_gla"),
        Form("fused_chunk_simple_gla", "constant"),
        Form("fused_recurrent_simple_gla", "simple_gla"),
        Form("fused_recurrent_simple_gla", "constant"),
        Form("parallel_simple_gla", "no decay", has_state=False),
        Form("parallel_simple_gla", "simple_gla", has_state=False),
        Form("chunk_retention", "retention"),
        Form("fused_chunk_retention", "retention"),
        Form("fused_recurrent_retention", "retention"),
        Form("parallel_retention", "retention", has_state=False),
        Form("chunk_lightning_attn", "lightning_attn"),
        Form("fused_recurrent_lightning_attn", "lightning_attn"),
        Form("chunk_gla", "gla", {"gk": "g"}),
        Form("fused_recurrent_gla", "gla"),
        Form("chunk_rwkv6", "rwkv6"),
        Form("fused_recurrent_rwkv6", "rwkv6"),
        Form("chunk_delta_rule", "delta_rule"),
        Form("fused_recurrent_delta_rule", "delta_rule"),
        Form("parallel_delta_rule", "delta_rule", has_state=False),
        Form("chunk_gated_delta_rule", "gated_delta_rule"),
        Form("fused_recurrent_gated_delta_rule", "gated_delta_rule"),
        Form("chunk_kda", "kda"),
        Form("fused_recurrent_kda", "kda"),
        Form("chunk_gated_delta_product", "gated_delta_product"),
        Form("chunk_dplr_delta_rule", "dplr"),
        Form("fused_recurrent_dplr_delta_rule", "dplr"),
        Form("chunk_iplr_delta_rule", "iplr"),
        Form("fused_recurrent_iplr_delta_rule", "iplr"),
        Form("chunk_rwkv7", "rwkv7"),
        Form("fused_recurrent_rwkv7", "rwkv7 scaled"),
    )
}
# One form of each family, with states.
FIRST = {form.family: form.name for form in reversed(FORMS.values()) if form.has_state}


def accumulator(dtype: str) -> str:
    """The dtype of states."""
    return "float64" if dtype == "float64" else "float32"


def wide(x: np.ndarray) -> np.ndarray:
    """Returns an array in float64."""
    return np.asarray(x).astype(np.float64)


def draw_inputs(
    family: str, sizes: Sizes, dtype: str, *, seed: int = 0, beside: str | None = None
) -> dict[str, np.ndarray]:
    """Returns the inputs of an operator by name, those in `BESIDE` of another dtype if one is given."""
    drawn = FAMILIES[family].draw(Draw(sizes, seed))
    kinds = {name: beside if beside and name in BESIDE else dtype for name in drawn}
    if "g_gamma" in drawn:
        kinds["g_gamma"] = "float64"
    return {name: x.astype(DTYPES[kinds[name]]) for name, x in drawn.items()}


def draw_states(
    family: str, sizes: Sizes, dtype: str, *, sequences: int | None = None, seed: int = 1
) -> tuple[np.ndarray, ...]:
    """Returns the states before the first token."""
    count = sizes.batch if sequences is None else sequences
    draw = Draw(sizes, seed)
    states = [draw.normal(count, sizes.value_heads, sizes.keys, sizes.values)]
    if FAMILIES[family].is_normalized:
        states.append(draw.uniform(0.0, 1.0, count, 1, sizes.value_heads, sizes.keys))
    return tuple(x.astype(DTYPES[accumulator(dtype)]) for x in states)


def expect(
    family: str,
    inputs: Mapping[str, np.ndarray],
    states: tuple[np.ndarray, ...] | None = None,
    **options: Any,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Returns what the oracle says, outputs and states."""
    described = FAMILIES[family]
    initial = None if states is None else tuple(wide(x) for x in states)
    if initial is not None and not described.is_normalized:
        (initial,) = initial
    o, final = described.oracle(
        **{name: wide(x) for name, x in inputs.items()},
        initial_state=initial,
        **{**described.options, **options},
    )
    return o, final if isinstance(final, tuple) else (final,)


def call(
    form: str, inputs: Mapping[str, Any], states: tuple[Any, ...] | None = None, **options: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Calls a public function; returns outputs and states, none where it has none."""
    named = FORMS[form]
    family = FAMILIES[named.family]
    options = {**family.options, **options}
    if named.family == "rwkv7 scaled":
        # The oracle's other default.
        del options["scale"]
    if named.has_state:
        initial = None if states is None else states if family.is_normalized else states[0]
        options = {"initial_state": initial, "output_final_state": True, **options}
    function = getattr(ops, named.function)
    o, final = function(**{named.names.get(name, name): x for name, x in inputs.items()}, **options)
    if final is None:
        return o, ()
    return o, final if isinstance(final, tuple) else (final,)


def check(
    found: tuple[Any, tuple[Any, ...]], expected: tuple[np.ndarray, tuple[np.ndarray, ...]], dtype: str
) -> None:
    """Checks outputs and states, those of half types by the mean of their errors."""
    o, states = found
    assert str(o.dtype).removeprefix("torch.") == dtype
    if dtype in HALF:
        assert_mean_close(o, expected[0])
    else:
        assert_largest_close(o, expected[0], dtype, "o")
    for state, wanted in zip(states, expected[1], strict=False):
        assert str(state.dtype).removeprefix("torch.") == accumulator(dtype)
        if dtype == "bfloat16" and MULTIPLIES_BF16:
            assert_mean_close(state, wanted)
        else:
            assert_largest_close(state, wanted, dtype, "final_state")


def assert_largest_close(found: Any, expected: np.ndarray, dtype: str, name: str) -> None:
    """Compares the largest error with the largest expected magnitude."""
    floor = TOLERANCES[dtype] * float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
    assert_close(found, expected, naive=expected, dtype=dtype, floor=floor, name=name)


def assert_mean_close(found: Any, expected: np.ndarray) -> None:
    """Compares the mean of the squares of errors with that of the expected numbers."""
    found = found.double().numpy() if hasattr(found, "double") else wide(found)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = np.sqrt(np.mean((found - expected) ** 2)) if found.size else 0.0
    limit = RATIO * np.sqrt(np.mean(expected**2)) if found.size else 0.0
    assert error <= limit, f"root mean square of errors {error:.3e}, limit {limit:.3e}"


class Problem(NamedTuple):
    """A call and what it should return. Arrays are read-only."""

    inputs: Mapping[str, np.ndarray]
    states: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, tuple[np.ndarray, ...]]


@cache
def problem(
    family: str, sizes: Sizes, dtype: str, *, has_state: bool = True, beside: str | None = None
) -> Problem:
    """Returns the same problem whenever asked, as oracles take their time."""
    inputs = draw_inputs(family, sizes, dtype, beside=beside)
    states = draw_states(family, sizes, dtype)
    for x in (*inputs.values(), *states):
        x.setflags(write=False)
    return Problem(inputs, states, expect(family, inputs, states if has_state else None))


@contextmanager
def about(*what: Any) -> Iterator[None]:
    """Says in failures within what they are about, as tests go through many cases."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def solve(form: str, sizes: Sizes, dtype: str, **options: Any) -> None:
    """Calls a form on its problem and checks what it returns."""
    named = FORMS[form]
    has_state = named.has_state
    given = problem(named.family, sizes, dtype, has_state=has_state, **options)
    with about(form, sizes):
        check(call(form, given.inputs, given.states if has_state else None), given.expected, dtype)


def part(family: str, inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Returns the inputs from one token to another."""
    repeated = FAMILIES[family].repeated
    times = {name: PRODUCT if name in repeated else 1 for name in inputs}
    return {
        name: x if name in {"u", "g_gamma"} else x[:, start * times[name] : stop * times[name]]
        for name, x in inputs.items()
    }


def bounds_of(lengths: tuple[int, ...]) -> np.ndarray:
    """Where packed sequences begin, and where the last one ends."""
    return np.cumsum([0, *lengths])


def spans(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last token of packed sequences."""
    return list(pairwise(bounds_of(lengths).tolist()))


def bits(array: Any) -> np.ndarray:
    """The bytes of an array, of whatever library, in order."""
    if hasattr(array, "detach"):
        import torch

        array = array.detach().contiguous()
        array = array.view(torch.int16).numpy() if array.dtype == torch.bfloat16 else array.numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same_bits(found: tuple[Any, tuple[Any, ...]], expected: tuple[Any, tuple[Any, ...]]) -> None:
    """Checks that outputs and states are the same to the last bit."""
    assert len(found[1]) == len(expected[1])
    for x, y in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert tuple(x.shape) == tuple(y.shape)
        np.testing.assert_array_equal(bits(x), bits(y))
