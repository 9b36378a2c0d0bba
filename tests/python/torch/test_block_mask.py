"""Block masks of FlexAttention: the same keys as their `mask_mod` shows."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask, noop_mask, or_masks

import subquad


def causal(batch, head, q, k):
    return q >= k


def window(batch, head, q, k):
    return (q - k).abs() <= 70


def by_head(batch, head, q, k):
    return (q + k + head) % 3 != 0


DOCUMENTS = torch.arange(400) // 90


def same_document(batch, head, q, k):
    return (DOCUMENTS[q] + batch) == (DOCUMENTS[k] + batch)


MODS = {
    "nothing hidden": noop_mask,
    "causal": causal,
    "window": and_masks(causal, window),
    "documents": and_masks(same_document, causal),
    "union": or_masks(same_document, window),
    "by head": by_head,
    "all hidden": lambda batch, head, q, k: q < 0,
}


@pytest.mark.parametrize("block", [128, 32])
@pytest.mark.parametrize("lengths", [(400, 400), (3, 400), (130, 257)])
@pytest.mark.parametrize("name", MODS)
def test_the_keys_that_mask_mod_shows(name, lengths, block):
    queries, keys = lengths
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 32) for n in (queries, keys, keys))
    mask = create_block_mask(MODS[name], 2, 4, queries, keys, device="cpu", BLOCK_SIZE=block)
    places = torch.meshgrid(
        torch.arange(2), torch.arange(4), torch.arange(queries), torch.arange(keys), indexing="ij"
    )
    dense = MODS[name](*places).expand(2, 4, queries, keys)
    found = subquad.attention(q, k, v, mask=mask)
    torch.testing.assert_close(found, subquad.attention(q, k, v, bias=dense), rtol=0, atol=2e-6)


def test_a_mask_for_all_sequences_and_heads_composes():
    q, k, v = (torch.randn(2, 300, 4, 16) for _ in range(3))
    mask = create_block_mask(window, None, None, 300, 300, device="cpu")
    expected = subquad.attention(q, k, v, window_size=(70, 0), softcap=3.0)
    found = subquad.attention(q, k, v, causal=True, mask=mask, softcap=3.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_other_lengths_are_refused():
    q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
    with pytest.raises(ValueError, match=r"mask: .*100 queries.*\(64, 64\)"):
        subquad.attention(q, k, v, mask=create_block_mask(causal, None, None, 64, 64, device="cpu"))
    with pytest.raises(ValueError, match=r"mask: .*sequences"):
        subquad.attention(q, k, v, mask=create_block_mask(causal, 3, None, 100, 100, device="cpu"))


def test_numpy_queries():
    q, k, v = (np.random.default_rng(0).standard_normal((1, 100, 2, 16)).astype(np.float32) for _ in range(3))
    mask = create_block_mask(causal, None, None, 100, 100, device="cpu")
    found = subquad.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(found, subquad.attention(q, k, v, causal=True), rtol=0, atol=2e-6)
