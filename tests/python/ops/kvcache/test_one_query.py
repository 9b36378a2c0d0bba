"""The same kernel by other entries: `attention` and `scaled_dot_product_attention` of one query."""

import numpy as np
import pytest
import torch

import subquad

from .caches import bits


@pytest.mark.parametrize("keys", [1, 65, 300])
@pytest.mark.parametrize("of", ["nothing", "padding", "float", "both"])
def test_one_query_by_attention(of, keys, dtype, draw, check_attention):
    q, k, v = draw(dtype, 3, 1, 8, 64), draw(dtype, 3, keys, 2, 64), draw(dtype, 3, keys, 2, 64)
    clean = q, k.copy(), v.copy()
    lengths = np.array([keys, keys // 2, 0])
    visible = np.arange(keys) < lengths[:, None, None, None]
    accumulator = "float64" if dtype == "float64" else "float32"
    bias = None
    if of == "float":
        bias = draw(accumulator, 3, 8, 1, keys)
    elif of == "both":
        bias = np.where(visible, draw(accumulator, 3, 8, 1, keys), -np.inf).astype(accumulator)
    elif of == "padding":
        bias = visible
    if of in {"padding", "both"}:
        for b, n in enumerate(lengths):
            k[b, n:], v[b, n:] = np.nan, np.inf
    for causal in (False, True):
        check_attention(q, k, v, clean=clean, scores=20.0, bias=bias, causal=causal)


def test_attention_of_one_query_equals_the_cache(dtype, draw):
    q, k, v = draw(dtype, 2, 1, 8, 64), draw(dtype, 2, 700, 2, 64), draw(dtype, 2, 700, 2, 40)
    cached = subquad.attention_with_kvcache(q, k, v, return_softmax_lse=True)
    plain = subquad.attention(q, k, v, return_lse=True)
    assert [bits(x) for x in cached] == [bits(x) for x in plain]


@pytest.mark.parametrize("of", ["nothing", "padding", "float"])
def test_one_query_by_sdpa(of, dtype, draw, convert, check_sdpa):
    query, key, value = (
        convert("torch", draw(dtype, *shape)) for shape in ((2, 8, 1, 32), (2, 2, 300, 32), (2, 2, 300, 32))
    )
    mask = None
    if of == "padding":
        mask = torch.arange(300) < torch.tensor([300, 41])[:, None, None, None]
    elif of == "float":
        mask = convert("torch", draw("float64" if dtype == "float64" else "float32", 2, 1, 1, 300))
        mask = mask.to(query.dtype)
    check_sdpa(query, key, value, mask, enable_gqa=True)


def test_one_query_by_sdpa_with_garbage_in_hidden_keys(dtype, draw, convert):
    query, key, value = (
        convert("torch", draw(dtype, *shape)) for shape in ((2, 4, 1, 32), (2, 4, 300, 32), (2, 4, 300, 32))
    )
    mask = torch.arange(300) < torch.tensor([300, 41])[:, None, None, None]
    clean = subquad.scaled_dot_product_attention(query, key, value, mask)
    key[1, :, 41:], value[1, :, 41:] = torch.nan, torch.inf
    dirty = subquad.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(dirty, clean)
