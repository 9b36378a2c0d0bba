"""Gradients are bitwise equal for every number of threads, in every run, whatever else is asked for; and right at every level."""

from itertools import combinations

import numpy as np
import pytest

import subquad

NAMES = ("q", "k", "v", "bias", "relative_bias", "alibi_slopes", "sinks")


@pytest.fixture(params=[(150, 200), (2, 1500)], ids=str)
def arguments(request, dtype, draw):
    """Arguments of a call with everything in it."""
    queries, keys = request.param
    accumulator = "float64" if dtype == "float64" else "float32"
    q, do = draw(dtype, 2, queries, 4, 24), draw(dtype, 2, queries, 4, 16)
    k, v = draw(dtype, 2, keys, 2, 24), draw(dtype, 2, keys, 2, 16)
    options = {
        "causal": True,
        "bias": draw(accumulator, 4, 1, keys),
        "relative_bias": draw(accumulator, 1, queries + keys - 1),
        "alibi_slopes": np.abs(draw("float32", 4)) / 8,
        "sinks": draw(accumulator, 4),
    }
    return (do, q, k, v, *subquad.attention(q, k, v, return_lse=True, **options)), options


def bits(arguments, options, wrt=NAMES):
    return [x.tobytes() for x in subquad.attention_backward(*arguments, wrt=wrt, **options)]


def test_threads_do_not_change_bits(arguments, keep_num_threads):
    found = []
    for threads in (1, 2, 3, 5, 1):
        subquad.set_num_threads(threads)
        found.append(bits(*arguments))
    assert all(x == found[0] for x in found)


def test_runs_do_not_change_bits(arguments, num_threads):
    arrays, options = arguments
    first = bits(arrays, options)
    for _ in range(2):
        # Other calls leave other numbers in the threads' scratch.
        bits([x[:, ::-1] * 100 if x.ndim == 4 else x for x in arrays], {"causal": True}, NAMES[:3])
        assert bits(arrays, options) == first


def test_what_else_is_asked_for_does_not_change_bits(arguments):
    arrays, options = arguments
    whole = dict(zip(NAMES, bits(arrays, options), strict=True))
    asked = [names for count in (1, 2) for names in combinations(NAMES[:3], count)]
    for names in [*asked, *((name,) for name in NAMES[3:]), NAMES[::-1], ("sinks", "k", "bias"), ()]:
        assert bits(arrays, options, names) == [whole[name] for name in names]


def test_a_list_of_names_will_do(arguments):
    arrays, options = arguments
    assert bits(arrays, options, list(NAMES)) == bits(arrays, options)
    default = subquad.attention_backward(*arrays, **options)
    assert isinstance(default, tuple)
    assert [x.tobytes() for x in default] == bits(arrays, options, NAMES[:3])


CHECK = """
    import hashlib
    import ml_dtypes
    import numpy as np
    import subquad
    from subquad import reference
    from subquad.testing import assert_close, gradient_floors, naive_attention_backward

    generator = np.random.default_rng(6)
    digest = hashlib.sha256()
    for name in ("float32", "float64", "float16", "bfloat16"):
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
        for queries, keys, heads, kv_heads, width in [(1, 200, 4, 4, 64), (65, 100, 4, 1, 20), (70, 63, 2, 2, 33)]:
            for causal in (False, True):
                q, do, k, v = (
                    generator.standard_normal((2, length, count, width)).astype(dtype)
                    for length, count in [(queries, heads)] * 2 + [(keys, kv_heads)] * 2
                )
                results = subquad.attention(q, k, v, causal=causal, return_lse=True)
                found = subquad.attention_backward(do, q, k, v, *results, causal=causal)
                exact = reference.attention(q, k, v, causal=causal, return_lse=True)
                expected = reference.attention_backward(do, q, k, v, *exact, causal=causal)
                naive = naive_attention_backward(do, q, k, v, dtype=name, causal=causal)
                floors = gradient_floors(expected, do, q, k, v, *exact, dtype=name, causal=causal)
                for x, *rest in zip(found, expected, naive, floors):
                    assert_close(x, rest[0], naive=rest[1], floor=rest[2], dtype=name, gradient=True)
                    digest.update(x.tobytes())
    print(subquad._native.config()["level"], digest.hexdigest())
"""


def test_every_level(run_python, levels):
    for level in levels:
        chosen, digest = run_python(CHECK, SUBQUAD_ISA=level).split()
        assert chosen == level
        assert run_python(CHECK, SUBQUAD_ISA=level, SUBQUAD_NUM_THREADS="3").split()[1] == digest


def test_tiny_blocks(run_python, levels):
    environment = {"SUBQUAD_ISA": levels[-1], "SUBQUAD_BLOCK_Q": "1", "SUBQUAD_BLOCK_K": "8"}
    one = run_python(CHECK, **environment)
    assert run_python(CHECK, **environment, SUBQUAD_NUM_THREADS="3") == one
