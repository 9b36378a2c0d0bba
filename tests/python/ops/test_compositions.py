"""Every feature of `attention` with every other, at random."""

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subquad.masks import block_causal, causal, chunked, document, padding, prefix, sliding_window
from subquad.normalizers import Power, ReLU, Sigmoid, Softplus

DTYPES = ["float32", "float64", "float16", "bfloat16"]
SETTINGS = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    # Fixtures are functions without state.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

lengths = st.sampled_from([1, 2, 63, 64, 65, 100])
sides = st.none() | st.sampled_from([0, 1, 5, 31, 64, 500])
windows = st.tuples(sides, sides)


class Call:
    """Arguments of `attention`, shown by shapes: whole arrays would bury the failure that they belong to."""

    def __init__(self, arrays, options):
        self.arrays, self.options = arrays, options

    def __repr__(self):
        def short(x):
            return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else repr(x)

        options = ", ".join(f"{name}={short(x)}" for name, x in self.options.items())
        return f"{', '.join(short(x) for x in self.arrays)}: {options}"


def normal(seed, dtype, *shape):
    """The same standard normal array for the same arguments."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.random.default_rng([*np.atleast_1d(seed), *shape]).standard_normal(shape).astype(kind)


def simple_masks(batch, queries, keys):
    """Masks that fit these lengths."""

    def integers(low, high, count):
        return st.lists(st.integers(low, high), min_size=count, max_size=count)

    return st.one_of(
        st.builds(causal),
        st.builds(sliding_window, sides, sides),
        st.builds(chunked, st.sampled_from([1, 7, 16, 64])),
        st.builds(block_causal, st.sampled_from([1, 7, 16, 64])),
        st.builds(prefix, st.integers(0, keys) | integers(0, keys, batch)),
        st.builds(
            lambda ends, start, queries: padding([max(end, start) for end in ends], start, queries=queries),
            integers(0, keys, batch),
            st.integers(0, 9),
            st.booleans(),
        ),
        st.builds(
            lambda seed, documents: document(
                np.random.default_rng(seed).integers(0, documents, (batch, queries)),
                np.sort(np.random.default_rng(seed + 1).integers(0, documents, keys)),
            ),
            st.integers(0, 9),
            st.integers(1, 5),
        ),
    )


def any_masks(*shape):
    simple = simple_masks(*shape)
    return st.recursive(
        simple,
        lambda inner: st.builds(lambda a, b, both: a & b if both else a | b, inner, inner, st.booleans()),
        max_leaves=4,
    )


@st.composite
def calls(draw):
    """Draws arguments of `attention`: lengths of prefill or of decode, and any of the options."""
    dtype, batch = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 2))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = kv_heads * group
    queries = draw(st.sampled_from([1, 1, 2, 3, 5]) | lengths)
    keys = draw(lengths | st.just(700)) if queries <= 5 else draw(lengths)
    width, width_v = draw(st.sampled_from([8, 20, 32, 64])), draw(st.sampled_from([1, 8, 20, 64]))
    accumulator = "float64" if dtype == "float64" else "float32"
    arrays = (
        normal(0, dtype, batch, queries, heads, width),
        normal(1, dtype, batch, keys, kv_heads, width),
        normal(2, dtype, batch, keys, kv_heads, width_v),
    )

    def number(seed, *shape):
        return normal(seed, draw(st.sampled_from([dtype, accumulator])), *shape)

    def a_bias():
        axes = [n if draw(st.booleans()) else 1 for n in (batch, heads, queries, keys)]
        bias = number(3, *axes)
        return bias > -0.7 if draw(st.booleans()) else bias

    def a_window():
        if draw(st.booleans()):
            return draw(windows)
        of_heads = draw(st.lists(windows, min_size=heads, max_size=heads))
        if draw(st.booleans()):
            return of_heads
        return np.array([[-1 if side is None else side for side in pair] for pair in of_heads])

    per_query = [(queries,), (heads, 1), (heads, queries), (batch, 1, 1), (batch, heads, queries)]
    every = {
        "causal": lambda: True,
        "window_size": a_window,
        "mask": lambda: draw(any_masks(batch, queries, keys)),
        "scale": lambda: number(4, *draw(st.sampled_from(per_query))) / 4,
        "bias": a_bias,
        "relative_bias": lambda: number(5, draw(st.sampled_from([1, heads])), queries + keys - 1),
        "softcap": lambda: draw(st.sampled_from([0.5, 3.0, 50.0])),
        "alibi_slopes": lambda: (
            np.abs(normal(6, "float32", *draw(st.sampled_from([(heads,), (batch, heads)])))) / 8
        ),
        "length_scale": lambda: np.log1p(np.arange(keys + 1)).astype(accumulator) / 2,
        "sinks": lambda: number(7, *draw(st.sampled_from([(heads,), *per_query[2:]]))),
        "normalizer": lambda: draw(
            st.sampled_from([Sigmoid(-2.0), Softplus(), ReLU(), ReLU(2, normalize=False), Power(2)])
        ),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(every)), max_size=6, unique=True))
    if "normalizer" in chosen and "sinks" in chosen:
        chosen.remove("sinks")
    options = {name: every[name]() for name in chosen}
    return Call(arrays, options)


@given(call=calls())
@SETTINGS
def test_any_composition_is_right(call, check_attention):
    arrays, options = call.arrays, call.options
    # Biases and distances add to scores: their rounding counts as that of larger ones.
    largest = 40.0 + (0.5 * arrays[1].shape[1] if "alibi_slopes" in options else 0.0)
    check_attention(*arrays, scores=largest, **options)
