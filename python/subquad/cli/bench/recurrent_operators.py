"""The recurrent operators that are measured: their arguments, their oracles, and their floating-point operations.

Operations are those that the algorithm needs for one token of one sequence, with a multiplication and an addition counted as
two. What operators with a matrix for a state do, they do in chunks of `C` tokens, of which token `i` sees those before it
and itself, on average half of them; for each head, with keys of `K` and values of `V` numbers:

- additive, `4 K V + C (K + V)`: the state is read by the query and written to, `2 K V` each; products of queries with keys,
  `C K`, and of those with values, `C V`;
- delta, `6 K V + 2 C (K + V)`: keys read the state as well, `2 K V`; products of keys with keys, `C K`, and the triangular
  system that they make for what is written, `C V`;
- low rank (`diag + b a^T`), `8 K V + 4 C (K + V)`: queries and `a` read the state, `k v^T` and `b z^T` are written; four
  kinds of products of rows with rows, each of which goes into `V` numbers.

`C` is 32, the engine's: with larger chunks it would be said to do more useful work in the same time. Exponentials, decays,
normalisations and whatever is proportional to `K + V` alone do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Sizes = Mapping[str, int]

_CHUNK = 32
# Keys for each token of the gated delta product.
_KEYS = 2
# Letters of axes that no file gives a size: sequences (1 where it does not), tokens, keys of the gated delta product.
_OF_CALLS = frozenset("BTU")


class Input(NamedTuple):
    """An array that an operator takes.

    Attributes:
        axes: A letter for each axis. `B`: sequences; `T`: tokens; `U`: keys of all tokens of the gated delta product.
        draw: How its numbers are drawn, see `recurrent_inputs`.
        wide: Whether it is float32 beside half types.
    """

    axes: str
    draw: str = "normal"
    wide: bool = False


@dataclass(frozen=True)
class Operator:
    """An operator.

    Attributes:
        function: Its name in `subquad.ops`.
        oracle: Its name in `subquad.reference.recurrent`.
        inputs: What it takes, by the names of its arguments.
        out: The axes of its outputs.
        flops: Floating-point operations for one token of one sequence.
        options: Arguments that are no arrays, of the function and of the oracle.
        oracle_names: What the oracle calls inputs, where that differs.
        step: The function in `subquad.ops` that takes some more tokens and updates its state, `[B, H, K, V]`, in place;
            empty where there is none.
        varies_by_head: Whether heads differ by their number, so that none can be computed alone.
        moves_memory: Whether it does so little with each number that it is held against copying its inputs to its outputs.
    """

    function: str
    oracle: str
    inputs: Mapping[str, Input]
    out: str
    flops: Callable[[Sizes], int]
    options: Mapping[str, Any] = field(default_factory=dict)
    oracle_names: Mapping[str, str] = field(default_factory=dict)
    step: str = ""
    varies_by_head: bool = False
    moves_memory: bool = False

    @property
    def letters(self) -> frozenset[str]:
        """The letters of axes that a shape gives sizes."""
        return frozenset("".join(each.axes for each in self.inputs.values())) - _OF_CALLS


def all_sizes(sizes: Sizes, tokens: int) -> dict[str, int]:
    """Returns the sizes of all letters, of those that a shape gives."""
    return {"B": 1, **sizes, "T": tokens, "U": tokens * _KEYS}


def _products(keys: int, values: int, kinds: int = 1) -> int:
    return kinds * _CHUNK * (keys + values)


def _additive(sizes: Sizes) -> int:
    keys, values = sizes["K"], sizes["V"]
    return sizes["H"] * (4 * keys * values + _products(keys, values))


def _turning(sizes: Sizes) -> int:
    """Of a complex state whose real part is read: keys have a real and an imaginary part."""
    return _additive({**sizes, "K": 2 * sizes["K"]})


def _slots(sizes: Sizes) -> int:
    """Of two states one behind the other, `[K, M]` and `[M, V]`."""
    return _additive({**sizes, "V": sizes["M"]}) + _additive({**sizes, "K": sizes["M"]})


def _delta(sizes: Sizes) -> int:
    keys, values = sizes["K"], sizes["V"]
    return sizes["H"] * (6 * keys * values + _products(keys, values, 2))


def _delta_product(sizes: Sizes) -> int:
    """Of keys that read, solve and write, and a query that reads and has products with keys."""
    keys, values = sizes["K"], sizes["V"]
    products = _products(keys, values)
    return sizes["H"] * (_KEYS * (4 * keys * values + products) + 2 * keys * values + products)


def _low_rank(sizes: Sizes) -> int:
    keys, values = sizes["K"], sizes["V"]
    return sizes["H"] * (8 * keys * values + _products(keys, values, 4))


def _state_space(sizes: Sizes) -> int:
    """Additive, but that all heads of a group share the products of queries with keys."""
    keys, values = sizes["N"], sizes["P"]
    return sizes["H"] * (4 * keys * values + _products(0, values)) + sizes["G"] * _products(keys, 0)


def _scan(sizes: Sizes) -> int:
    """For each number of the state: `delta A`, `delta u B`, a product and a sum into the state, and the same into the output."""
    return 6 * sizes["D"] * sizes["N"]


def _convolution(sizes: Sizes) -> int:
    return 2 * sizes["D"] * sizes["W"]


_QUERIES, _VALUES = Input("BTHK"), Input("BTHV")
_QKV = {"q": _QUERIES, "k": _QUERIES, "v": _VALUES}
# Keys of length 1, without which the delta rules' states grow without bound.
_UNIT_KEYS = {"q": _QUERIES, "k": Input("BTHK", "unit"), "v": _VALUES}
_DECAYS = Input("BTH", "decay", wide=True)
_CHANNEL_DECAYS = Input("BTHK", "decay", wide=True)
_STRENGTHS = Input("BTH", "strength")
# `b` takes away part of what `a` finds.
_LOW_RANK = {"a": Input("BTHK", "unit"), "b": Input("BTHK", "part of a")}
_NORMALISED = {"use_qk_l2norm_in_kernel": True}

# In the forms that models call: queries and keys of Qwen3-Next's and Kimi Linear's rules are normalised by the kernel,
# Mamba's step sizes have biases and go through a softplus.
OPERATORS: Mapping[str, Operator] = {
    "linear_attn": Operator(
        "chunk_linear_attn", "linear_attn", _QKV, "BTHV", _additive, {"normalize": False}
    ),
    "simple_gla": Operator("chunk_simple_gla", "simple_gla", {**_QKV, "g": _DECAYS}, "BTHV", _additive),
    "retention": Operator("chunk_retention", "retention", _QKV, "BTHV", _additive, varies_by_head=True),
    "lightning_attn": Operator(
        "chunk_lightning_attn",
        "lightning_attn",
        _QKV,
        "BTHV",
        _additive,
        {"layer_idx": 0, "num_layers": 12},
        varies_by_head=True,
    ),
    "gla": Operator(
        "chunk_gla", "gla", {**_QKV, "g": _CHANNEL_DECAYS}, "BTHV", _additive, oracle_names={"g": "gk"}
    ),
    "rwkv6": Operator(
        "chunk_rwkv6",
        "rwkv6",
        {"r": _QUERIES, "k": _QUERIES, "v": _VALUES, "w": _CHANNEL_DECAYS, "u": Input("HK", wide=True)},
        "BTHV",
        _additive,
    ),
    "gate_loop": Operator(
        "chunk_gate_loop", "gateloop", {**_QKV, "a": Input("BTHK", "turn")}, "BTHV", _turning
    ),
    "gsa": Operator(
        "chunk_gsa",
        "gsa",
        {**_QKV, "s": Input("BTHM", "strength"), "g": Input("BTHM", "decay", wide=True)},
        "BTHV",
        _slots,
    ),
    "mlstm": Operator(
        "mlstm_chunkwise",
        "mlstm",
        {
            "q": Input("BHTK"),
            "k": Input("BHTK"),
            "v": Input("BHTV"),
            "i": Input("BHT", wide=True),
            "f": Input("BHT", "kept", wide=True),
        },
        "BHTV",
        _additive,
    ),
    "delta_rule": Operator(
        "chunk_delta_rule", "delta_rule", {**_QKV, "beta": _STRENGTHS}, "BTHV", _delta, _NORMALISED
    ),
    "gated_delta_rule": Operator(
        "chunk_gated_delta_rule",
        "gated_delta_rule",
        {**_QKV, "g": _DECAYS, "beta": _STRENGTHS},
        "BTHV",
        _delta,
        _NORMALISED,
        step="fused_recurrent_gated_delta_rule",
    ),
    "gated_delta_product": Operator(
        "chunk_gated_delta_product",
        "gated_delta_product",
        {
            "q": _QUERIES,
            "k": Input("BUHK"),
            "v": Input("BUHV"),
            "g": _DECAYS,
            "beta": Input("BUH", "strength"),
        },
        "BTHV",
        _delta_product,
        {"num_householder": _KEYS, **_NORMALISED},
    ),
    "kda": Operator(
        "chunk_kda",
        "kda",
        {**_QKV, "g": _CHANNEL_DECAYS, "beta": _STRENGTHS},
        "BTHV",
        _delta,
        _NORMALISED,
        step="fused_recurrent_kda",
    ),
    "dplr_delta_rule": Operator(
        "chunk_dplr_delta_rule",
        "dplr_delta_rule",
        {**_UNIT_KEYS, **_LOW_RANK, "gk": _CHANNEL_DECAYS},
        "BTHV",
        _low_rank,
    ),
    "iplr_delta_rule": Operator(
        "chunk_iplr_delta_rule", "iplr_delta_rule", {**_UNIT_KEYS, **_LOW_RANK}, "BTHV", _low_rank
    ),
    "rwkv7": Operator(
        "chunk_rwkv7",
        "rwkv7",
        {
            "r": _QUERIES,
            "w": _CHANNEL_DECAYS,
            "k": Input("BTHK", "unit"),
            "v": _VALUES,
            **_LOW_RANK,
        },
        "BTHV",
        _low_rank,
    ),
    "mamba2": Operator(
        "mamba_chunk_scan_combined",
        "mamba_chunk_scan_combined",
        {
            "x": Input("BTHP"),
            "dt": Input("BTH"),
            "A": Input("H", "rate", wide=True),
            "B": Input("BTGN"),
            "C": Input("BTGN"),
            "D": Input("H", wide=True),
            "dt_bias": Input("H", "step bias", wide=True),
        },
        "BTHP",
        _state_space,
        {"chunk_size": 256, "dt_softplus": True},
    ),
    "mamba": Operator(
        "selective_scan_fn",
        "selective_scan_fn",
        {
            "u": Input("BDT"),
            "delta": Input("BDT"),
            "A": Input("DN", "rate", wide=True),
            "B": Input("BNT"),
            "C": Input("BNT"),
            "D": Input("D", wide=True),
            "z": Input("BDT"),
            "delta_bias": Input("D", "step bias", wide=True),
        },
        "BDT",
        _scan,
        {"delta_softplus": True},
    ),
    "causal_conv1d": Operator(
        "causal_conv1d_fn",
        "causal_conv1d_fn",
        {"x": Input("BDT"), "weight": Input("DW")},
        "BDT",
        _convolution,
        {"activation": "silu"},
        moves_memory=True,
    ),
}
