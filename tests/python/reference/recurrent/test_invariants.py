"""What holds for every recurrence: states carry sequences on, packed sequences are apart, and layouts are only layouts."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from subquad.reference import recurrent

B, T, H, HV, K, V, M, N, P, CHANNELS = 2, 7, 2, 4, 3, 2, 3, 4, 5, 4
HOUSEHOLDERS = 2
GENERATOR = np.random.default_rng(5)


def numbers(*shape):
    return GENERATOR.standard_normal(shape)


def decays(*shape):
    return -np.exp(numbers(*shape))


def complex_decays(*shape):
    return np.exp(decays(*shape) + 1j * numbers(*shape))


def strengths(*shape):
    return GENERATOR.random(shape) * 2


class Case(NamedTuple):
    """A function and what it takes."""

    function: Any
    tokens: dict[str, tuple[Any, tuple[int, ...]]]
    """For each token: how to draw it, and its shape."""
    states: tuple[tuple[int, ...], ...]
    """Shapes of the states of a sequence."""
    constants: dict[str, Any] = {}  # noqa: RUF012
    state_name: str = "initial_state"
    time_axis: int = 1
    per_token: dict[str, int] = {}  # noqa: RUF012
    """How many places along the time axis a token has, where it is not one."""
    draw_state: Any = numbers
    continues: bool = True
    """Whether the states are all that is remembered."""
    nothing: tuple[float, ...] = (0.0, 0.0, 0.0)
    """What states are without tokens."""


QKV = {"q": (numbers, (H, K)), "k": (numbers, (H, K)), "v": (numbers, (H, V))}
RKV = {"r": (numbers, (H, K)), "k": (numbers, (H, K)), "v": (numbers, (H, V))}
GROUPED = {"q": (numbers, (H, K)), "k": (numbers, (H, K)), "v": (numbers, (HV, V))}
LOW_RANK = {"a": (numbers, (H, K)), "b": (numbers, (H, K))}
GATES = {"i": (numbers, (H,)), "f": (numbers, (H,))}
SSD = {
    "x": (numbers, (H, P)),
    "dt": (numbers, (H,)),
    "B": (numbers, (1, N)),
    "C": (numbers, (1, N)),
    "z": (numbers, (H, P)),
}
SCAN = {
    "u": (numbers, (CHANNELS,)),
    "delta": (numbers, (CHANNELS,)),
    "B": (numbers, (N,)),
    "C": (numbers, (N,)),
    "z": (numbers, (CHANNELS,)),
}
MATRIX = ((H, K, V),)

CASES = {
    "linear_attn": Case(recurrent.linear_attn, QKV, MATRIX, {"normalize": False}),
    "normalized linear_attn": Case(
        recurrent.linear_attn,
        {"q": (strengths, (H, K)), "k": (strengths, (H, K)), "v": (numbers, (H, V))},
        ((H, K, V), (1, H, K)),
        {"normalize": True},
        draw_state=strengths,
    ),
    "simple_gla": Case(
        recurrent.simple_gla, QKV | {"g": (decays, (H,))}, MATRIX, {"g_gamma": decays(H), "scale": -0.3}
    ),
    "retention": Case(recurrent.retention, QKV, MATRIX),
    "lightning_attn": Case(recurrent.lightning_attn, QKV, MATRIX, {"layer_idx": 1, "num_layers": 5}),
    "gla": Case(recurrent.gla, QKV | {"gk": (decays, (H, K)), "gv": (decays, (H, V))}, MATRIX),
    "rwkv6": Case(recurrent.rwkv6, RKV | {"w": (decays, (H, K))}, MATRIX, {"u": numbers(H, K)}),
    "gateloop": Case(
        recurrent.gateloop,
        QKV | {"a": (complex_decays, (H, K))},
        MATRIX,
        draw_state=complex_decays,
    ),
    "hgrn": Case(recurrent.hgrn, {"x": (numbers, (M,)), "g": (decays, (M,))}, ((M,),)),
    "gsa": Case(
        recurrent.gsa,
        {
            "q": (numbers, (HV, K)),
            "k": (numbers, (H, K)),
            "v": (numbers, (H, V)),
            "s": (numbers, (H, M)),
            "g": (decays, (H, M)),
        },
        ((H, K, M), (H, M, V)),
    ),
    "lightnet": Case(recurrent.lightnet, QKV, ((H, K, V), (1, H, K)), nothing=(0.0, -np.inf)),
    "abc": Case(recurrent.gsa, QKV | {"s": (numbers, (H, M))}, ((H, K, M), (H, M, V)), continues=False),
    "mlstm": Case(recurrent.mlstm, QKV | GATES, ((H, K, V), (H, K), (H,))),
    "mlstm_sigmoid": Case(recurrent.mlstm_sigmoid, QKV | GATES, MATRIX),
    "normalized mlstm_sigmoid": Case(
        recurrent.mlstm_sigmoid, QKV | GATES, ((H, K, V), (H, K)), {"normalize": True}
    ),
    "delta_rule": Case(
        recurrent.delta_rule,
        QKV | {"beta": (strengths, (H,))},
        MATRIX,
        {"use_qk_l2norm_in_kernel": True},
    ),
    "gated_delta_rule": Case(
        recurrent.gated_delta_rule,
        GROUPED
        | {
            "g": (decays, (HV,)),
            "beta": (numbers, (HV, V)),
            "gk": (decays, (HV, K)),
            "gv": (decays, (HV, V)),
        },
        ((HV, K, V),),
        {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True},
    ),
    "kda": Case(
        recurrent.kda,
        GROUPED | {"g": (numbers, (HV, K)), "beta": (numbers, (HV,))},
        ((HV, K, V),),
        {
            "use_gate_in_kernel": True,
            "A_log": numbers(HV),
            "dt_bias": numbers(HV * K),
            "use_qk_l2norm_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": True,
        },
    ),
    "gated_delta_product": Case(
        recurrent.gated_delta_product,
        QKV | {"g": (decays, (H,)), "beta": (strengths, (H,))},
        MATRIX,
        {"num_householder": HOUSEHOLDERS, "use_qk_l2norm_in_kernel": True},
        per_token={"k": HOUSEHOLDERS, "v": HOUSEHOLDERS, "beta": HOUSEHOLDERS},
    ),
    "dplr_delta_rule": Case(recurrent.dplr_delta_rule, QKV | LOW_RANK | {"gk": (decays, (H, K))}, MATRIX),
    "iplr_delta_rule": Case(recurrent.iplr_delta_rule, QKV | LOW_RANK, MATRIX),
    "rwkv7": Case(recurrent.rwkv7, RKV | LOW_RANK | {"w": (decays, (H, K))}, MATRIX),
    "mamba_chunk_scan_combined": Case(
        recurrent.mamba_chunk_scan_combined,
        SSD,
        ((H, P, N),),
        {
            "A": decays(H),
            "D": numbers(H, P),
            "dt_bias": numbers(H),
            "dt_softplus": True,
            "dt_limit": (0.3, 1),
        },
        state_name="initial_states",
    ),
    "selective_scan_fn": Case(
        recurrent.selective_scan_fn,
        SCAN,
        ((CHANNELS, N),),
        {
            "A": decays(CHANNELS, N),
            "D": numbers(CHANNELS),
            "delta_bias": numbers(CHANNELS),
            "delta_softplus": True,
        },
        time_axis=2,
    ),
    "causal_conv1d_fn": Case(
        recurrent.causal_conv1d_fn,
        {"x": (numbers, (CHANNELS,))},
        ((CHANNELS, 3),),
        {"weight": numbers(CHANNELS, 4), "bias": numbers(CHANNELS), "activation": "silu"},
        state_name="initial_states",
        time_axis=2,
    ),
}
# The recurrent forms of these take `reverse`, these and their kin `state_v_first`.
REVERSIBLE = (
    "linear_attn",
    "normalized linear_attn",
    "simple_gla",
    "retention",
    "lightning_attn",
    "gla",
    "rwkv6",
    "gsa",
    "abc",
    "dplr_delta_rule",
)
TRANSPOSABLE = ("simple_gla", "retention", "gla", "gated_delta_rule", "kda")


@pytest.fixture(params=CASES)
def case(request):
    """Every recurrence."""
    return CASES[request.param]


def tokens_of(case, batch, length):
    drawn = {}
    for name, (draw, shape) in case.tokens.items():
        x = draw(batch, length * case.per_token.get(name, 1), *shape)
        drawn[name] = np.moveaxis(x, 1, case.time_axis)
    return drawn


def states_of(case, count):
    return tuple(case.draw_state(count, *shape) for shape in case.states)


def part(case, tokens, start, end):
    """The tokens from `start` to `end`."""
    parts = {}
    for name, x in tokens.items():
        places = case.per_token.get(name, 1)
        parts[name] = np.take(x, range(start * places, end * places), axis=case.time_axis)
    return parts


def run(case, tokens, states=None, **options):
    """The output and the final states, always a tuple."""
    if states is not None:
        options[case.state_name] = states if len(states) > 1 else states[0]
    o, final = case.function(**tokens, **case.constants, **options)
    final = final if isinstance(final, tuple) else (final,)
    assert o.dtype == np.float64
    assert [x.shape[1:] for x in final] == list(case.states)
    return o, final


def check(found, expected):
    o, final = found
    expected_o, expected_final = expected
    np.testing.assert_allclose(o, expected_o, rtol=1e-11, atol=1e-12)
    for x, y in zip(final, expected_final, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 4, T])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.continues])
def test_states_carry_a_sequence_on(name, cut):
    case = CASES[name]
    tokens, states = tokens_of(case, B, T), states_of(case, B)
    first, between = run(case, part(case, tokens, 0, cut), states)
    second, last = run(case, part(case, tokens, cut, T), between)
    check((np.concatenate([first, second], axis=case.time_axis), last), run(case, tokens, states))


def test_no_state_is_nothing(case):
    tokens = tokens_of(case, B, T)
    nothing = tuple(np.full((B, *shape), x) for shape, x in zip(case.states, case.nothing, strict=False))
    check(run(case, tokens), run(case, tokens, nothing))


@pytest.mark.parametrize("lengths", [(3, 0, 1, 5), (6,), (0,), (1, 1)])
@pytest.mark.parametrize("has_state", [False, True])
def test_packed_sequences_are_apart(case, lengths, has_state):
    bounds = np.cumsum([0, *lengths])
    tokens = tokens_of(case, 1, int(bounds[-1]))
    states = states_of(case, len(lengths)) if has_state else None
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        one = None if states is None else tuple(x[n : n + 1] for x in states)
        o, final = run(case, part(case, tokens, start, end), one)
        outputs.append(o)
        finals.append(final)
    expected = tuple(np.concatenate(x) for x in zip(*finals, strict=True))
    for cu_seqlens in (bounds, bounds.astype(np.int32), bounds.tolist()):
        found = run(case, tokens, states, cu_seqlens=cu_seqlens)
        check(found, (np.concatenate(outputs, axis=case.time_axis), expected))


def test_packed_sequences_lie_in_one_row(case):
    with pytest.raises(ValueError, match="cu_seqlens needs one row of packed sequences, not 2"):
        run(case, tokens_of(case, B, T), cu_seqlens=[0, T])


def test_rows_are_apart(case):
    tokens, states = tokens_of(case, B, T), states_of(case, B)
    o, final = run(case, tokens, states)
    for b in range(B):
        alone = run(
            case, {name: x[b : b + 1] for name, x in tokens.items()}, tuple(x[b : b + 1] for x in states)
        )
        check((o[b : b + 1], tuple(x[b : b + 1] for x in final)), alone)


def test_the_future_has_no_influence(case):
    tokens, states = tokens_of(case, B, T), states_of(case, B)
    past, future = part(case, tokens, 0, 4), part(case, tokens_of(case, B, T), 4, T)
    other = {name: np.concatenate([x, future[name]], axis=case.time_axis) for name, x in past.items()}
    found, expected = (np.moveaxis(run(case, x, states)[0], case.time_axis, 0) for x in (other, tokens))
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-13, atol=0)
    assert (found[4:] != expected[4:]).any(axis=tuple(range(1, found.ndim))).all()


def test_inputs_are_left_alone(case):
    tokens, states = tokens_of(case, B, T), states_of(case, B)
    copies = {name: x.copy() for name, x in tokens.items()}, tuple(x.copy() for x in states)
    for x in (*tokens.values(), *states):
        x.setflags(write=False)
    run(case, tokens, states)
    for name, x in tokens.items():
        np.testing.assert_array_equal(x, copies[0][name])
    for x, y in zip(states, copies[1], strict=True):
        np.testing.assert_array_equal(x, y)


def test_other_types_are_widened_exactly(case):
    tokens, states = tokens_of(case, B, T), states_of(case, B)
    kinds = {"f": np.float32, "c": np.complex64}
    tokens = {name: x.astype(kinds[x.dtype.kind]) for name, x in tokens.items()}
    states = tuple(x.astype(kinds[x.dtype.kind]) for x in states)
    wide = {"f": np.float64, "c": np.complex128}
    expected = run(
        case,
        {name: x.astype(wide[x.dtype.kind]) for name, x in tokens.items()},
        tuple(x.astype(wide[x.dtype.kind]) for x in states),
    )
    o, final = run(case, tokens, states)
    np.testing.assert_array_equal(o, expected[0])
    for x, y in zip(final, expected[1], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_reverse_reads_from_the_end(name):
    case = CASES[name]
    tokens, states = tokens_of(case, B, T), states_of(case, B)
    o, final = run(case, {name: x[:, ::-1] for name, x in tokens.items()}, states)
    check(run(case, tokens, states, reverse=True), (o[:, ::-1], final))
    packed, states = tokens_of(case, 1, T), states_of(case, 2)
    o, final = run(case, packed, states, reverse=True, cu_seqlens=[0, 3, T])
    first = run(case, part(case, packed, 0, 3), tuple(x[:1] for x in states), reverse=True)
    check((o[:, :3], tuple(x[:1] for x in final)), first)


@pytest.mark.parametrize("name", TRANSPOSABLE)
def test_states_may_be_transposed(name):
    case = CASES[name]
    tokens, (state,) = tokens_of(case, B, T), states_of(case, B)
    o, (final,) = run(case, tokens, (state,))
    options = {case.state_name: state.swapaxes(-1, -2), "state_v_first": True}
    found, turned = case.function(**tokens, **case.constants, **options)
    check((found, (turned.swapaxes(-1, -2),)), (o, (final,)))


def test_every_oracle_is_tried():
    steps = {"causal_conv1d_update", "selective_state_update"}
    # Each token by itself; tried where the operators are.
    rows = {"gdn_gate", "kda_gate", "rms_norm_gated"}
    assert {case.function.__name__ for case in CASES.values()} | steps | rows == set(recurrent.__all__)
