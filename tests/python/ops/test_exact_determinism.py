"""Results are bitwise equal for every number of threads and in every run, and right at every level."""

import numpy as np
import pytest

import subquad


# Many tasks, which threads take in any order; few queries are computed in pieces, which are merged.
@pytest.fixture(params=[(300, 400), (2, 5000)], ids=str)
def arguments(request, dtype, draw):
    """Arguments of a call with everything in it."""
    queries, keys = request.param
    q = draw(dtype, 2, queries, 4, 64)
    k, v = draw(dtype, 2, keys, 2, 64), draw(dtype, 2, keys, 2, 40)
    return (q, k, v), {
        "causal": True,
        "bias": np.random.default_rng(5).random((queries, keys)) > 0.1,
        "return_lse": True,
    }


@pytest.mark.parametrize("masked", [False, True])
def test_threads_do_not_change_bits(masked, arguments, keep_num_threads):
    inputs, options = arguments
    options = options if masked else {"return_lse": True}
    results = []
    for threads in (1, 2, 3, 5, 1, 5):
        subquad.set_num_threads(threads)
        out, lse = subquad.attention(*inputs, **options)
        results.append((out.tobytes(), lse.tobytes()))
    assert len(set(results)) == 1


def test_runs_do_not_change_bits(arguments, num_threads):
    inputs, options = arguments
    first = [x.tobytes() for x in subquad.attention(*inputs, **options)]
    for _ in range(5):
        # Other calls leave other numbers in the threads' scratch.
        subquad.attention(*(x[:, ::-1] * 100 for x in inputs))
        assert [x.tobytes() for x in subquad.attention(*inputs, **options)] == first


CHECK = """
    import hashlib
    import numpy as np
    import subquad
    from subquad import reference
    from subquad.testing import assert_close, lse_floor, naive_attention
    import ml_dtypes

    generator = np.random.default_rng(6)
    digest = hashlib.sha256()
    for name in ("float32", "float64", "float16", "bfloat16"):
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
        shapes = [(1, 200, 4, 4, 64), (2, 700, 4, 2, 64), (65, 100, 4, 1, 20), (100, 63, 2, 2, 33)]
        for queries, keys, heads, kv_heads, width in shapes:
            for causal in (False, True):
                q, k, v = (
                    generator.standard_normal((2, length, count, width)).astype(dtype)
                    for length, count in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
                )
                out, lse = subquad.attention(q, k, v, causal=causal, return_lse=True)
                expected, expected_lse = reference.attention(q, k, v, causal=causal, return_lse=True)
                naive, naive_lse = naive_attention(q, k, v, dtype=name, causal=causal)
                assert_close(out, expected, naive=naive, dtype=name)
                floor = lse_floor(expected_lse, name)
                assert_close(lse, expected_lse, naive=naive_lse, dtype=name, floor=floor)
                digest.update(out.tobytes() + lse.tobytes())
    print(subquad._native.config()["level"], digest.hexdigest())
"""


def test_every_level(run_python, levels):
    digests = {}
    for level in levels:
        chosen, digests[level] = run_python(CHECK, SUBQUAD_ISA=level).split()
        assert chosen == level
        assert run_python(CHECK, SUBQUAD_ISA=level, SUBQUAD_NUM_THREADS="3").split()[1] == digests[level]
    if len(levels) > 1:
        # Equal digests would mean that the variable chose nothing.
        assert len(set(digests.values())) > 1


def test_tiny_blocks(run_python, levels):
    for level in {levels[0], levels[-1]}:
        environment = {"SUBQUAD_ISA": level, "SUBQUAD_BLOCK_Q": "1", "SUBQUAD_BLOCK_K": "8"}
        one = run_python(CHECK, **environment)
        assert run_python(CHECK, **environment, SUBQUAD_NUM_THREADS="3") == one
        assert run_python(CHECK, SUBQUAD_ISA=level) != one


def test_queries_do_not_depend_on_their_neighbours(dtype, draw):
    q, k, v = draw(dtype, 1, 200, 2, 32), draw(dtype, 1, 150, 2, 32), draw(dtype, 1, 150, 2, 32)
    whole = subquad.attention(q, k, v)
    # Parts of enough rows for the same kernel.
    parts = [subquad.attention(q[:, i : i + 41], k, v) for i in range(0, 200, 41)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
