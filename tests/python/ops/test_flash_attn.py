"""The functions of FlashAttention 2: their signatures, and that each is the operator it stands for."""

import inspect

import numpy as np
import pytest
import torch

import subquad
from subquad import flash_attn

OPTIONS = (
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
)
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# As in version 2.8 of the package.
SIGNATURES = {
    "flash_attn_func": (("q", "k", "v"), OPTIONS),
    "flash_attn_kvpacked_func": (("q", "kv"), OPTIONS),
    "flash_attn_qkvpacked_func": (("qkv",), OPTIONS),
    "flash_attn_varlen_func": (("q", "k", "v", *LENGTHS), (*OPTIONS, ("block_table", None))),
    "flash_attn_varlen_kvpacked_func": (("q", "kv", *LENGTHS), OPTIONS),
    "flash_attn_varlen_qkvpacked_func": (("qkv", "cu_seqlens", "max_seqlen"), OPTIONS),
    "flash_attn_with_kvcache": (
        ("q", "k_cache", "v_cache"),
        (
            *((name, None) for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")),
            *((name, None) for name in ("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale")),
            ("causal", False),
            ("window_size", (-1, -1)),
            ("softcap", 0.0),
            ("rotary_interleaved", True),
            ("alibi_slopes", None),
            ("num_splits", 0),
            ("return_softmax_lse", False),
        ),
    ),
}
SLOPES = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
# Arguments of the functions, and what they are to `subquad.attention`.
CALLS = [
    ({}, {}),
    ({"causal": True, "softmax_scale": 0.2}, {"causal": True, "scale": 0.2}),
    ({"window_size": (5, 0)}, {"window_size": (5, 0)}),
    ({"window_size": (-1, 2), "causal": True}, {"window_size": (None, 2), "causal": True}),
    ({"window_size": (np.int64(3), np.int64(-1))}, {"window_size": (3, None)}),
    ({"window_size": [3, -1], "softcap": 1.5}, {"window_size": (3, None), "softcap": 1.5}),
    ({"alibi_slopes": SLOPES, "deterministic": True}, {"alibi_slopes": SLOPES}),
]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    required, optional = SIGNATURES[name]
    empty = inspect.Parameter.empty
    found = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert [(p.name, p.default) for p in found] == [*((x, empty) for x in required), *optional]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in found)


def test_names():
    assert set(flash_attn.__all__) == set(SIGNATURES)
    assert subquad.flash_attn is flash_attn


def same(found, expected):
    """Checks that results have the same bits."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            same(x, y)
    elif expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_equal_lengths(call, dtype, draw):
    given, meant = call
    q, kv = draw(dtype, 2, 20, 4, 16), draw(dtype, 2, 33, 2, 2, 16)
    expected, lse = subquad.attention(q, kv[:, :, 0], kv[:, :, 1], return_lse=True, **meant)
    same(flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **given), expected)
    same(flash_attn.flash_attn_kvpacked_func(q, kv, **given), expected)
    triple = expected, lse, None
    same(flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], return_attn_probs=True, **given), triple)
    same(flash_attn.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **given), triple)
    qkv = draw(dtype, 2, 20, 3, 4, 16)
    expected, lse = subquad.attention(*(qkv[:, :, i] for i in range(3)), return_lse=True, **meant)
    same(flash_attn.flash_attn_qkvpacked_func(qkv, **given), expected)
    same(flash_attn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **given), (expected, lse, None))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_varlen(call, dtype, draw):
    given, _ = call
    q, kv = draw(dtype, 20, 4, 16), draw(dtype, 33, 2, 2, 16)
    cu_q, cu_k = np.array([0, 3, 20], np.int32), np.array([0, 16, 33], np.int32)
    lengths = cu_q, cu_k, 17, 17
    expected, lse = subquad.attention_varlen(q, kv[:, 0], kv[:, 1], *lengths, return_lse=True, **given)
    same(flash_attn.flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], *lengths, **given), expected)
    same(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **given), expected)
    triple = expected, lse, None
    same(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, return_attn_probs=True, **given), triple)
    qkv = draw(dtype, 20, 3, 4, 16)
    expected, lse = subquad.attention_varlen(
        *(qkv[:, i] for i in range(3)), cu_q, cu_q, return_lse=True, **given
    )
    same(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 17, **given), expected)
    found = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 17, return_attn_probs=True, **given)
    same(found, (expected, lse, None))


def test_varlen_pages(draw):
    q, pages = draw("float32", 5, 4, 16), draw("float32", 6, 4, 2, 16)
    table = np.array([[5, 0], [2, 1]], np.int32)
    lengths = np.array([0, 2, 5], np.int32), np.array([0, 7, 12], np.int32), 3, 7
    found = flash_attn.flash_attn_varlen_func(q, pages, pages, *lengths, causal=True, block_table=table)
    same(found, subquad.attention_varlen(q, pages, pages, *lengths, causal=True, block_table=table))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call[0]))
def test_kvcache(call, dtype, draw):
    given, _ = call
    given = {name: x for name, x in given.items() if name != "deterministic"}
    q, new = draw(dtype, 2, 1, 4, 16), draw(dtype, 2, 1, 2, 16)
    caches = [draw(dtype, 2, 40, 2, 16) for _ in range(2)]
    copies = [x.copy() for x in caches]
    options = given | {"cache_seqlens": np.array([7, 30], np.int32), "return_softmax_lse": True}
    found = flash_attn.flash_attn_with_kvcache(q, *caches, new, new, **options)
    same(found, subquad.attention_with_kvcache(q, *copies, new, new, **options))
    same(tuple(caches), tuple(copies))


@pytest.mark.parametrize("function", ["flash_attn_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"])
def test_packed_tensors_are_taken_apart_without_copies(function):
    seen = []

    class Watched(torch.Tensor):
        def __getitem__(self, index):
            part = super().__getitem__(index).as_subclass(torch.Tensor)
            seen.append(part.untyped_storage().data_ptr())
            return part

    varlen = "varlen" in function
    qkv = torch.randn(*((6,) if varlen else (1, 6)), 3, 2, 8)
    rest = (torch.tensor([0, 6], dtype=torch.int32), 6) if varlen else ()
    out = getattr(flash_attn, function)(qkv.as_subclass(Watched), *rest)
    assert type(out) is torch.Tensor
    assert seen == [qkv.untyped_storage().data_ptr()] * 3


def test_dropout_follows_the_generator_of_pytorch():
    qkv = torch.randn(1, 9, 3, 2, 8)

    def drawn(function, *arguments):
        torch.manual_seed(5)
        return function(*arguments, dropout_p=0.5)

    q, k, v = qkv.unbind(2)
    expected = drawn(subquad.attention, q, k, v)
    assert torch.equal(drawn(flash_attn.flash_attn_func, q, k, v), expected)
    assert torch.equal(drawn(flash_attn.flash_attn_kvpacked_func, q, qkv[:, :, 1:]), expected)
    assert torch.equal(drawn(flash_attn.flash_attn_qkvpacked_func, qkv), expected)
    assert not torch.equal(expected, subquad.attention(q, k, v))


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "varlen" in name])
def test_dropout_of_packed_sequences_is_refused(name):
    arguments = dict.fromkeys(SIGNATURES[name][0])
    for packed, parts in (("kv", 2), ("qkv", 3)):
        if packed in arguments:
            arguments[packed] = np.zeros((4, parts, 2, 8), np.float32)
    with pytest.raises(NotImplementedError, match=r"dropout_p: probability 0\.5"):
        getattr(flash_attn, name)(**arguments, dropout_p=0.5)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (
            lambda x: flash_attn.flash_attn_qkvpacked_func(x[:, :, :2]),
            r"qkv: expected shape \[B, S, 3, H, D\], got \(1, 4, 2, 2, 8\)",
        ),
        (lambda x: flash_attn.flash_attn_kvpacked_func(x[:, :, 0], x), r"kv: .*\[B, S, 2, H, D\]"),
        (lambda x: flash_attn.flash_attn_qkvpacked_func(x[0]), r"qkv: .*\(4, 3, 2, 8\)"),
        (
            lambda x: flash_attn.flash_attn_varlen_qkvpacked_func(x, None, 4),
            r"qkv: expected shape \[total, 3, H, D\], got \(1, 4, 3, 2, 8\)",
        ),
        (
            lambda x: flash_attn.flash_attn_varlen_kvpacked_func(x[0, :, 0], x[0], None, None, 4, 4),
            r"kv: .*\[total, 2, H, D\]",
        ),
    ],
)
def test_packed_shapes_are_checked(call, pattern):
    with pytest.raises(ValueError, match=pattern):
        call(np.zeros((1, 4, 3, 2, 8), np.float32))


@pytest.mark.parametrize("window_size", [5, (1, 2, 3), (1.5, 0), "ab", None], ids=str)
def test_windows_of_another_kind(window_size):
    q = np.zeros((1, 4, 2, 8), np.float32)
    if window_size is None:
        assert flash_attn.flash_attn_func(q, q, q, window_size=None).shape == q.shape
        return
    with pytest.raises(TypeError, match="window_size: "):
        flash_attn.flash_attn_func(q, q, q, window_size=window_size)
