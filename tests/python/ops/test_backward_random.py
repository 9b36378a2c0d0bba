"""Gradients through every feature of `attention` with every other, at random."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .test_compositions import calls, normal

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    # Fixtures are functions without state.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(
    call=calls(), seed=st.integers(0, 9), uses_lse=st.booleans(), library=st.sampled_from(["numpy", "torch"])
)
@SETTINGS
def test_any_composition_is_right(call, seed, uses_lse, library, check_backward):
    q, k, v = call.arrays
    dtype = str(q.dtype)
    do = normal([8, seed], dtype, *q.shape[:3], v.shape[3])
    accumulator = "float64" if dtype == "float64" else "float32"
    lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    dlse = normal([9, seed], accumulator, *lse_shape) if uses_lse else None
    check_backward(do, q, k, v, dlse=dlse, library=library, **call.options)
