"""`scaled_dot_product_attention` means what PyTorch's function means."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import subquad
from subquad import reference, scaled_dot_product_attention

# Shapes of query, key and value whose leading axes broadcast.
LEADING = [
    ((5, 8), (7, 8), (7, 6)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)),
    ((2, 1, 3, 2, 5, 8), (1, 2, 3, 2, 7, 8), (2, 2, 1, 1, 7, 6)),
    ((5, 8), (2, 3, 7, 8), (3, 7, 6)),
    ((4, 3, 5, 8), (7, 8), (1, 1, 7, 6)),
    ((1, 3, 5, 8), (4, 1, 7, 8), (4, 3, 7, 6)),
    ((3, 5, 8), (4, 2, 3, 7, 8), (2, 1, 7, 6)),
    ((1, 1, 1, 1, 1, 5, 8), (7, 8), (3, 7, 6)),
]
MASKS = ["nhls", "n1ls", "1hls", "n11s", "11ls", "nhl1", "1111", "hls", "1ls", "h1s", "ls", "1s", "l1", "11"]
SIZES = {"n": 2, "h": 3, "l": 9, "s": 14, "1": 1}


@pytest.fixture
def tensors(dtype, draw, convert):
    """Makes standard normal tensors of given shapes."""
    return lambda *shapes, width=1.0: [convert("torch", draw(dtype, *shape, width=width)) for shape in shapes]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", LEADING, ids=str)
def test_leading_axes(shapes, is_causal, tensors, check_sdpa):
    check_sdpa(*tensors(*shapes), is_causal=is_causal)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 3), (2, 5), (5, 2), (1, 70), (70, 1), (65, 100)])
def test_causal_aligns_at_the_first_query_and_key(queries, keys, tensors, check_sdpa):
    query, key, value = tensors((2, 2, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    check_sdpa(query, key, value, is_causal=True)
    check_sdpa(query, key, value, torch.ones(queries, keys, dtype=torch.bool).tril())


@pytest.mark.parametrize("of", ["bool", "float32", "own"])
@pytest.mark.parametrize("axes", MASKS)
def test_mask_of_every_form(axes, of, dtype, draw, convert, tensors, check_sdpa):
    shape = tuple(SIZES[axis] for axis in axes)
    mask = convert("torch", draw(dtype if of == "own" else "float32", *shape))
    mask = mask > -0.5 if of == "bool" else mask
    check_sdpa(*tensors((2, 3, 9, 8), (2, 3, 14, 8), (2, 3, 14, 8)), mask)


@pytest.mark.parametrize("shape", [(14,), (1,), ()])
def test_masks_that_broadcast_without_a_query_axis(shape, tensors, check_sdpa):
    # PyTorch's default kernel raises IndexError for them, its formula does not.
    check_sdpa(*tensors((2, 3, 9, 8), (2, 3, 14, 8), (2, 3, 14, 8)), torch.zeros(shape))


def test_mask_broadcasts_over_leading_axes(tensors, check_sdpa):
    inputs = tensors((4, 2, 3, 5, 8), (1, 2, 3, 7, 8), (4, 1, 3, 7, 8))
    for shape in [(4, 2, 3, 5, 7), (4, 1, 1, 5, 7), (1, 2, 1, 1, 7), (2, 3, 5, 7), (5, 7)]:
        check_sdpa(*inputs, torch.from_numpy(np.random.default_rng(3).random(shape) > 0.4))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 8, 9, 16), (2, 2, 14, 16), (2, 2, 14, 8)),
        ((2, 8, 9, 16), (2, 1, 14, 16), (2, 1, 14, 8)),
        ((2, 6, 9, 16), (2, 6, 14, 16), (2, 6, 14, 8)),
        ((8, 9, 16), (4, 14, 16), (4, 14, 8)),
        ((3, 8, 9, 16), (1, 2, 14, 16), (1, 2, 14, 8)),
        ((2, 3, 4, 9, 16), (2, 1, 2, 14, 16), (2, 3, 2, 14, 8)),
    ],
    ids=str,
)
def test_grouped_heads(shapes, tensors, check_sdpa):
    query, key, value = tensors(*shapes)
    check_sdpa(query, key, value, enable_gqa=True)
    check_sdpa(query, key, value, enable_gqa=True, is_causal=True)
    mask = torch.from_numpy(np.random.default_rng(4).random((shapes[0][-3], 9, 14)) > 0.4)
    check_sdpa(query, key, value, mask, enable_gqa=True)


def test_grouped_heads_of_key_and_value_may_differ(tensors, check_sdpa):
    check_sdpa(*tensors((1, 4, 3, 8), (1, 2, 5, 8), (1, 1, 5, 8)), enable_gqa=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.3, 2.0])
def test_scale(scale, tensors, check_sdpa):
    check_sdpa(*tensors((2, 2, 9, 8), (2, 2, 14, 8), (2, 2, 14, 8)), scale=scale)


@pytest.mark.parametrize("width", [0, 1, 20, 512])
def test_width(width, tensors, check_sdpa):
    check_sdpa(*tensors((1, 2, 9, width), (1, 2, 14, width), (1, 2, 14, 8)))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
        ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
        ((2, 3, 0, 8), (2, 3, 0, 8), (2, 3, 0, 6)),
        ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 6)),
        ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 0)),
        ((0, 2, 3, 5, 8), (1, 2, 3, 7, 8), (2, 3, 7, 6)),
    ],
    ids=str,
)
def test_empty(shapes, tensors):
    inputs = tensors(*shapes)
    expected = torch_sdpa(*inputs)
    out = scaled_dot_product_attention(*inputs)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    # No keys: zeros.
    assert torch.equal(out, torch.zeros_like(expected))


@pytest.mark.parametrize("of", ["bool", "-inf"])
def test_fully_masked_rows(of, tensors):
    inputs = tensors((2, 3, 9, 8), (2, 3, 14, 8), (2, 3, 14, 8))
    visible = torch.ones(9, 14, dtype=torch.bool)
    visible[[0, 4, 8]] = False
    mask = visible if of == "bool" else torch.zeros(9, 14).masked_fill(~visible, -torch.inf)
    out = scaled_dot_product_attention(*inputs, mask.to(inputs[0].dtype) if of == "-inf" else mask)
    assert (out[:, :, [0, 4, 8]] == 0).all()
    assert (torch_sdpa(*inputs, visible)[:, :, [0, 4, 8]] == 0).all()


def test_rows_of_the_lowest_number_are_uniform(tensors):
    # As masks of transformers have them for padded queries.
    query, key, value = tensors((1, 2, 3, 8), (1, 2, 16, 8), (1, 2, 16, 8))
    mask = torch.full((3, 16), torch.finfo(torch.bfloat16).min).to(query.dtype)
    if query.dtype == torch.float16:
        mask = torch.full((3, 16), torch.finfo(torch.float32).min)
    mean = torch_sdpa(query, key, value, mask)
    torch.testing.assert_close(mean, value.mean(-2, keepdim=True).expand(1, 2, 3, 8))
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value, mask), mean)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_numbers_propagate_as_in_torch(place, bad, tensors, check_sdpa):
    query, key, value = tensors((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    mask = torch.zeros(5, 7, dtype=query.dtype)
    # -inf in the mask hides; NaN and inf do not.
    [query, key, value, mask][place][..., 1, 2] = bad
    check_sdpa(query, key, value, mask)
    out, expected = scaled_dot_product_attention(query, key, value, mask), torch_sdpa(query, key, value, mask)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_mask_and_causal_together_raise_as_in_torch(tensors):
    inputs = tensors((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    mask = torch.ones(5, 7, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal"):
        torch_sdpa(*inputs, mask, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask: expected None when is_causal=True"):
        scaled_dot_product_attention(*inputs, mask, is_causal=True)


def test_positional_arguments_are_in_torchs_order(tensors):
    query, key, value = tensors((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    by_name = scaled_dot_product_attention(query=query, key=key, value=value, is_causal=True, scale=0.25)
    by_place = scaled_dot_product_attention(query, key, value, None, 0.0, True, 0.25, False)
    assert torch.equal(by_name, by_place)


def test_strided_tensors(tensors):
    query, key, value = tensors((2, 3, 9, 8), (2, 3, 14, 8), (2, 3, 14, 8))
    expected = scaled_dot_product_attention(query, key, value)
    for permute in [(0, 2, 1, 3), (2, 1, 0, 3), (3, 2, 1, 0), (0, 1, 3, 2)]:
        back = [permute.index(axis) for axis in range(4)]
        views = [x.permute(permute).contiguous().permute(back) for x in (query, key, value)]
        assert torch.equal(scaled_dot_product_attention(*views), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_library(threads, library, dtype, draw, convert, keep_num_threads):
    subquad.set_num_threads(threads)
    arrays = [draw(dtype, 2, 3, 9, 8), draw(dtype, 2, 3, 14, 8), draw(dtype, 2, 3, 14, 8)]
    expected = scaled_dot_product_attention(*arrays)
    out = scaled_dot_product_attention(*(convert(library, x) for x in arrays))
    out = out.double().numpy() if library == "torch" else np.asarray(out)
    np.testing.assert_array_equal(out.astype(np.float64), expected.astype(np.float64))
    assert np.abs(expected - reference.scaled_dot_product_attention(*arrays)).max() < 0.02
