"""`out=`: results go where they are asked to, or the call is refused."""

import jax
import numpy as np
import pytest
import torch

import subquad


@pytest.fixture
def arrays(dtype, draw):
    """`q`, `k` and `v` of NumPy; the result is `[2, 9, 4, 8]`."""
    return draw(dtype, 2, 9, 4, 16), draw(dtype, 2, 14, 2, 16), draw(dtype, 2, 14, 2, 8)


def blank(dtype, shape):
    """Returns memory that shows what was not written."""
    return np.full(shape, np.nan).astype(dtype)


LAYOUTS = {
    "plain": lambda dtype: blank(dtype, (2, 9, 4, 8)),
    "head-major": lambda dtype: blank(dtype, (2, 4, 9, 8)).swapaxes(1, 2),
    "token-major": lambda dtype: blank(dtype, (9, 4, 2, 8)).transpose(2, 0, 1, 3),
    "padded": lambda dtype: blank(dtype, (4, 27, 8, 11))[::2, 1::3, 1::2, 3:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy(layout, arrays, num_threads):
    expected = subquad.attention(*arrays)
    out = LAYOUTS[layout](arrays[0].dtype)
    whole = out if out.base is None else out.base
    assert subquad.attention(*arrays, out=out) is out
    np.testing.assert_array_equal(out, expected)
    # Nothing but the array's own elements was written.
    assert np.isnan(whole.astype(np.float64)).sum() == whole.size - out.size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(layout, arrays, convert):
    expected = subquad.attention(*arrays).astype(np.float64)
    q, k, v = (convert("torch", x) for x in arrays)
    like = LAYOUTS[layout](np.float32)
    out = torch.full((20_000,), torch.nan, dtype=q.dtype).as_strided(
        like.shape, [s // 4 for s in like.strides]
    )
    assert subquad.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out.double().numpy(), expected)


def test_the_log_sum_exp_comes_along(arrays):
    expected = subquad.attention(*arrays, return_lse=True)
    out = blank(arrays[0].dtype, (2, 9, 4, 8))
    given, lse = subquad.attention(*arrays, return_lse=True, out=out)
    assert given is out
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_dlpack_is_refused(arrays, convert):
    # Libraries that only speak DLPack, such as JAX, may rely on arrays that never change.
    q, k, v = (convert("dlpack", x) for x in arrays)
    memory = blank(arrays[0].dtype, (2, 9, 4, 8))
    with pytest.raises(ValueError, match="out: expected a writable array, got a DLPack array"):
        subquad.attention(q, k, v, out=convert("dlpack", memory))
    assert np.isnan(memory.astype(np.float64)).all()


@pytest.mark.parametrize("how", ["backwards", "misaligned"])
def test_what_cannot_be_written_in_place_is_refused(how, draw):
    arrays = [draw("float32", 2, 9, 4, 8) for _ in range(3)]
    if how == "backwards":
        out = blank(np.float32, (2, 9, 4, 8))[:, ::-1]
    else:
        out = np.zeros(2 * 9 * 4 * 8 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(2, 9, 4, 8)
    with pytest.raises(ValueError, match=r"^out: "):
        subquad.attention(*arrays, out=out)


def test_arrays_of_jax_do_not_change(draw):
    arrays = [jax.numpy.asarray(draw("float32", 1, 3, 2, 8)) for _ in range(3)]
    out = jax.numpy.zeros((1, 3, 2, 8), jax.numpy.float32)
    with pytest.raises(ValueError, match=r"^out: expected a writable array"):
        subquad.attention(*arrays, out=out)
    assert not np.asarray(out).any()


def test_writing_counts_as_a_change_in_autograd(draw):
    # A tensor that autograd has saved must not change unnoticed: its gradients would silently be wrong.
    tensors = [torch.from_numpy(draw("float32", 1, 3, 2, 8)) for _ in range(3)]
    out, weight = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8, requires_grad=True)
    loss = (weight * out).sum()
    subquad.attention(*tensors, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_disjoint_parts_of_one_array(draw):
    # Overlap is a matter of memory, not of ownership.
    memory = draw("float32", 4, 3, 2, 8)
    expected = subquad.attention(memory[:1], memory[1:2], memory[2:3])
    out = subquad.attention(memory[:1], memory[1:2], memory[2:3], out=memory[3:])
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(memory[3:], expected)
