"""Which masks stay descriptions, what they mean, and that code may treat them as tensors."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import LlamaConfig, masking_utils

import subquad.hf
from subquad.hf import registry
from subquad.hf.attention import attention_forward
from subquad.hf.mask_functions import describe
from subquad.hf.masks import structured_mask
from subquad.hf.patterns import Pattern, Span
from subquad.hf.structured_mask import DenseForm, StructuredMask

if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
    pytest.skip("the mask functions of this transformers have other arguments", allow_module_level=True)

CAUSAL = masking_utils.causal_mask_function


def _arguments(q_length, kv_length, offset=0, *, kv_offset=0, padding=None, function=CAUSAL, **others):
    return {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
        "allow_is_causal_skip": True,
        "allow_is_bidirectional_skip": function is masking_utils.bidirectional_mask_function,
        "dtype": torch.float32,
        "config": None,
        "device": "cpu",
        **others,
    }


def _dense(arguments):
    forced = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**{**arguments, **forced})


def _dense_of(mask, q_length, kv_length):
    # Torch warns of arrays that must not be written to.
    return torch.from_numpy(mask.dense(2, q_length, kv_length).copy())


def _expand(call, q_length, kv_length):
    """The tensor that one call's arguments stand for."""
    positions, keys = torch.arange(q_length) + call.visible - q_length, torch.arange(call.visible)
    distance = (keys[None] - positions[:, None]).expand(2, 1, q_length, call.visible)
    left, right = call.window_size or (None, None)
    mask = (distance <= 0) if call.causal else torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        mask = mask & (distance >= -left)
    if right is not None:
        mask = mask & (distance <= right)
    if call.bias is not None:
        mask = mask & call.bias
    if call.mask is not None:
        mask = mask & _dense_of(call.mask, q_length, call.visible)[:, None]
    return torch.nn.functional.pad(mask, (0, kv_length - call.visible))


def _assert_stands_for(call, arguments):
    """The arguments show the keys that transformers' mask shows; what padding sees does not matter."""
    q_length, kv_length = arguments["q_length"], arguments["kv_length"]
    found, expected = _expand(call, q_length, kv_length), _dense(arguments)
    given = arguments["attention_mask"]
    if given is not None and arguments["mask_function"] is not masking_utils.bidirectional_mask_function:
        first = int(arguments["q_offset"])
        tokens = given[:, first : first + q_length, None][:, None].expand(2, 1, q_length, kv_length)
        found, expected = found[tokens], expected[tokens]
    assert torch.equal(found, expected)


def _padding(length, left=0, right=0):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :left] = False
    mask[1, length - right :] = False
    return mask


LENGTHS = {
    "square": (9, 9, 0),
    "decode": (1, 9, 8),
    "chunk": (4, 9, 5),
    "static prefill": (4, 9, 0),
    "static chunk": (3, 9, 4),
    "static decode": (1, 9, 4),
    "last of two": (2, 9, 7),
    "beyond the keys": (3, 9, 8),
}


@pytest.mark.parametrize("padding", [None, (0, 0), (3, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_causal_and_padding(lengths, padding):
    q_length, kv_length, offset = lengths
    given = None if padding is None else _padding(offset + q_length, *padding)
    arguments = _arguments(q_length, kv_length, offset, padding=given)
    mask = structured_mask(**arguments)
    assert isinstance(mask, StructuredMask)
    call = mask.for_call(q_length, kv_length)
    assert call.visible == min(offset + q_length, kv_length)
    assert call.bias is None
    assert (call.mask is None) == (given is None or bool(given[:, : call.visible].all()))
    _assert_stands_for(call, arguments)
    assert torch.equal(mask.dense(), _dense(arguments))


@pytest.mark.parametrize("padding", [(3, 0), (0, 2)])
def test_bidirectional_and_padding(padding):
    function = masking_utils.bidirectional_mask_function
    arguments = _arguments(9, 9, padding=_padding(9, *padding), function=function)
    mask = structured_mask(**arguments)
    call = mask.for_call(9, 9)
    assert (call.causal, call.visible, call.bias) == (False, 9, None)
    _assert_stands_for(call, arguments)


def test_padding_in_pieces_stays_a_tensor_of_keys():
    padding = _padding(9, 2, 1)
    padding[0, 5] = False
    arguments = _arguments(9, 9, padding=padding)
    call = structured_mask(**arguments).for_call(9, 9)
    assert tuple(call.bias.shape) == (2, 1, 1, 9)
    _assert_stands_for(call, arguments)


def _of_model(create, **others):
    config = LlamaConfig(num_hidden_layers=1, sliding_window=3, attn_implementation="sdpa")
    config._attn_implementation = registry.NAME
    given = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    embeddings = torch.zeros(2, 5, 8)
    registry.register(attention_forward, structured_mask)
    try:
        return create(config, inputs_embeds=embeddings, attention_mask=given, **others)
    finally:
        registry.unregister_unused()


def test_queries_that_are_padding():
    """They see nothing where they are tokens of their own; what attends to an encoder's padding is none."""
    own = _of_model(masking_utils.create_bidirectional_mask).for_call(5, 5)
    assert not _dense_of(own.mask, 5, 5)[0, 3:].any()
    encoder = _of_model(
        masking_utils.create_bidirectional_mask, encoder_hidden_states=torch.zeros(2, 5, 8)
    ).for_call(5, 5)
    assert _dense_of(encoder.mask, 5, 5)[0, 3:, :3].all()


def test_keys_that_the_padding_mask_lacks_are_hidden():
    function = masking_utils.bidirectional_mask_function
    arguments = _arguments(4, 9, padding=_padding(7, left=1), function=function)
    _assert_stands_for(structured_mask(**arguments).for_call(4, 9), arguments)


def test_keys_that_do_not_start_at_the_first_token():
    arguments = _arguments(3, 7, 12, kv_offset=8, padding=_padding(15, left=10))
    _assert_stands_for(structured_mask(**arguments).for_call(3, 7), arguments)


def test_offset_of_a_static_cache_is_read_at_once():
    counter = torch.tensor(4)
    mask = structured_mask(**_arguments(3, 9, counter))
    counter.add_(3)
    assert mask.for_call(3, 9).visible == 7
    assert torch.equal(mask.dense(), _dense(_arguments(3, 9, 4)))


def test_positions_in_place_of_offset():
    arguments = _arguments(3, 9, 4)
    del arguments["q_length"], arguments["q_offset"]
    mask = structured_mask(**arguments, cache_position=torch.arange(4, 7))
    assert (mask.q_length, mask.offset) == (3, 4)


WINDOW = masking_utils.sliding_window_causal_mask_function
TWO_WAY = getattr(masking_utils, "sliding_window_bidirectional_mask_function", None)
CHUNKS = masking_utils.chunked_causal_mask_function
NO_PADDING = torch.zeros(2, dtype=torch.long)
PADDED = masking_utils.padding_mask_function(torch.ones(2, 9, dtype=torch.bool))


IMAGES = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1], [0, 0, 0, 0, -1, -1, -1, 1, 1]])
BLOCKS = masking_utils.blockwise_overlay
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])
DOCUMENTS = masking_utils.packed_sequence_mask_function(PACKED)
IN_DOCUMENTS = masking_utils.remap_positions_for_packed_sequence


@pytest.mark.parametrize(
    ("function", "span", "expected"),
    [
        (CAUSAL, Span(0, 8, 0, 8), Pattern(causal=True)),
        (masking_utils.bidirectional_mask_function, Span(0, 8, 0, 8), Pattern()),
        (WINDOW(9), Span(0, 8, 0, 8), Pattern(causal=True)),
        (WINDOW(8), Span(0, 8, 0, 8), Pattern(causal=True, left=7)),
        (WINDOW(8), Span(8, 8, 1, 8), Pattern(causal=True)),
        (WINDOW(8), Span(0, 7, 0, 30), Pattern(causal=True)),
        (TWO_WAY(8), Span(0, 8, 0, 8), Pattern()),
        (TWO_WAY(7), Span(0, 8, 0, 8), Pattern(left=7, right=7)),
        (CHUNKS(9, NO_PADDING), Span(0, 8, 0, 8), Pattern(causal=True)),
        (CHUNKS(8, NO_PADDING + 1), Span(0, 8, 0, 8), Pattern(causal=True)),
        (masking_utils.and_masks(WINDOW(8), WINDOW(3)), Span(0, 8, 0, 8), Pattern(causal=True, left=2)),
        (masking_utils.and_masks(CAUSAL, PADDED), Span(0, 8, 0, 8), None),
        (masking_utils.or_masks(CAUSAL, CAUSAL), Span(0, 8, 0, 8), Pattern(causal=True)),
        (masking_utils.or_masks(WINDOW(3), CAUSAL), Span(0, 8, 0, 8), Pattern(
            either=((Pattern(causal=True, left=2), Pattern(causal=True)),))),
        (masking_utils.or_masks(CAUSAL, PADDED), Span(0, 8, 0, 8), None),
        (masking_utils.or_masks(), Span(0, 8, 0, 8), None),
        (BLOCKS(IMAGES[:, :8]), Span(0, 8, 0, 8), None),
        (BLOCKS(IMAGES.float()), Span(0, 8, 0, 8), None),
        (masking_utils.and_masks(IN_DOCUMENTS(BLOCKS(IMAGES), PACKED), DOCUMENTS), Span(0, 8, 0, 8), None),
        (IN_DOCUMENTS(CAUSAL, PACKED), Span(0, 8, 0, 8), None),
        (lambda batch, head, q, k: k <= q, Span(0, 8, 0, 8), None),
    ],
)  # fmt: skip
def test_patterns(function, span, expected):
    assert describe(function, span) == expected


def test_packed_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(9))])
    function = masking_utils.and_masks(IN_DOCUMENTS(WINDOW(3), positions), DOCUMENTS)
    arguments = _arguments(9, 9, function=function, local_size=3, allow_is_causal_skip=False)
    call = structured_mask(**arguments).for_call(9, 9)
    assert call.window_size == (2, None)
    _assert_stands_for(call, arguments)


@pytest.mark.parametrize("window", [5, 9, 20])
@pytest.mark.parametrize("lengths", [(9, 9, 0), (1, 9, 8), (4, 9, 5), (4, 9, 2)])
def test_windows(window, lengths):
    q_length, kv_length, offset = lengths
    padding = _padding(offset + q_length, left=2)
    arguments = _arguments(*lengths, padding=padding, function=WINDOW(window), local_size=window)
    mask = structured_mask(**arguments)
    _assert_stands_for(mask.for_call(q_length, kv_length), arguments)
    assert torch.equal(mask.dense(), _dense(arguments))


def test_two_way_windows():
    arguments = _arguments(
        9, 9, padding=_padding(9, right=2), function=TWO_WAY(3), allow_is_bidirectional_skip=True
    )
    call = structured_mask(**arguments).for_call(9, 9)
    assert call.window_size == (3, 3)
    assert torch.equal(_expand(call, 9, 9), _dense(arguments))


@pytest.mark.parametrize("left", [None, 0, 1, 3])
@pytest.mark.parametrize("lengths", [(9, 9, 0), (1, 9, 8), (4, 9, 5), (4, 9, 2), (1, 9, 4)])
def test_chunks(lengths, left):
    q_length, kv_length, offset = lengths
    padding = None if left is None else _padding(offset + q_length, left=left)
    function = CHUNKS(4, torch.tensor([left or 0, 0]))
    arguments = _arguments(*lengths, padding=padding, function=function, local_size=4)
    mask = structured_mask(**arguments)
    _assert_stands_for(mask.for_call(q_length, kv_length), arguments)
    assert torch.equal(mask.dense(), _dense(arguments))


@pytest.mark.parametrize("left", [0, 2])
def test_chunks_of_a_cache_that_forgets(left):
    function = CHUNKS(4, torch.tensor([left, 0]))
    arguments = _arguments(2, 6, 9, kv_offset=5, padding=_padding(11, left=left), function=function)
    arguments["local_size"] = 4
    _assert_stands_for(structured_mask(**arguments).for_call(2, 6), arguments)


def _with_images(kind, ids):
    blocks = BLOCKS(ids)
    if kind == "all":
        return masking_utils.or_masks(CAUSAL, blocks)
    if kind == "window of all":
        inner = masking_utils.or_masks(CAUSAL, blocks)
        return masking_utils.and_masks(inner, masking_utils.sliding_window_overlay(3))
    return masking_utils.or_masks(WINDOW(3), blocks)


@pytest.mark.parametrize("kind", ["all", "window of all", "window or block"])
@pytest.mark.parametrize("padding", [None, (2, 0), (0, 2)])
@pytest.mark.parametrize(
    ("lengths", "kv_offset"),
    [((9, 9, 0), 0), ((4, 9, 5), 0), ((1, 9, 8), 0), ((9, 14, 0), 0), ((3, 14, 6), 0), ((3, 6, 6), 3)],
)
def test_images(lengths, kv_offset, padding, kind):
    q_length, kv_length, offset = lengths
    total = offset + q_length
    # As transformers does: places that no token has are in no block.
    ids = torch.nn.functional.pad(IMAGES, (0, 5), value=-1)
    given = None if padding is None else _padding(total, *padding)
    arguments = _arguments(
        *lengths,
        kv_offset=kv_offset,
        padding=given,
        function=_with_images(kind, ids),
        allow_is_causal_skip=False,
    )
    mask = structured_mask(**arguments)
    assert isinstance(mask, StructuredMask)
    call = mask.for_call(q_length, kv_length)
    assert call.visible == total - kv_offset
    assert call.bias is None
    _assert_stands_for(call, arguments)


def test_images_that_are_not_in_the_cache_yet_need_the_tensor():
    arguments = _arguments(5, 9, 0, function=_with_images("all", IMAGES), allow_is_causal_skip=False)
    assert structured_mask(**arguments).for_call(5, 9) is None


def test_last_token_reads_no_blocks():
    arguments = _arguments(1, 9, 8, function=_with_images("all", IMAGES), allow_is_causal_skip=False)
    assert structured_mask(**arguments).for_call(1, 9).mask is None


@pytest.mark.parametrize("function", [CAUSAL, WINDOW(3), CHUNKS(2, NO_PADDING)])
@pytest.mark.parametrize("images", [False, True])
def test_packed_documents_of_every_kind(function, images):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], list(range(9))])
    mask = IN_DOCUMENTS(function, positions)
    mask = masking_utils.or_masks(mask, BLOCKS(IMAGES)) if images else mask
    arguments = _arguments(
        9, 9, function=masking_utils.and_masks(mask, DOCUMENTS), allow_is_causal_skip=False
    )
    _assert_stands_for(structured_mask(**arguments).for_call(9, 9), arguments)


@pytest.mark.parametrize(
    "others",
    [
        {"allow_is_causal_skip": False},
        {"function": masking_utils.or_masks(CAUSAL, PADDED)},
    ],
)
def test_tensor_where_one_is_needed(others):
    arguments = _arguments(4, 9, 5, **others)
    mask = structured_mask(**arguments)
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, _dense(arguments))


@pytest.mark.parametrize(
    ("lengths", "left_out"),
    [((9, 9, 0), True), ((1, 9, 8), True), ((4, 9, 0), True), ((4, 9, 5), False), ((1, 9, 4), False)],
)
@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_masks_are_left_out_where_the_original_does(original, lengths, left_out, decoder):
    model = decoder("llama")
    model.set_attn_implementation(original)
    with subquad.hf.patch(model):
        arguments = _arguments(*lengths, config=model.config)
        assert (structured_mask(**arguments) is None) == (left_out and original == "sdpa")
        padded = {**arguments, "attention_mask": _padding(lengths[2] + lengths[0], left=1)}
        assert isinstance(structured_mask(**padded), StructuredMask)
        # Attention could not tell a window that hides nothing from one that is forgotten.
        assert isinstance(structured_mask(**arguments, local_size=9), StructuredMask)


def test_own_mask_is_passed_through():
    mask = structured_mask(**_arguments(4, 9, 5))
    assert structured_mask(**_arguments(4, 9, 5, padding=mask)) is mask


def _mask():
    return structured_mask(**_arguments(4, 9, 5, padding=_padding(9, left=2)))


def test_reads_as_a_tensor():
    mask, dense = _mask(), _mask().dense()
    assert mask.shape == dense.shape
    assert (mask.ndim, mask.dim(), len(mask)) == (4, 4, 2)
    assert (mask.size(), mask.size(-1), mask.device) == (dense.shape, 9, dense.device)
    assert mask.dtype == torch.bool
    same = (mask.contiguous(), mask.detach(), mask.clone(), mask.to("cpu"), mask.to(torch.device("cpu")))
    assert all(one is mask for one in same)
    assert mask.for_call(4, 9) is not None


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask[:, 0],
        lambda mask: ~mask,
        lambda mask: mask & torch.ones(9, dtype=torch.bool),
        lambda mask: torch.ones(9, dtype=torch.bool) & mask,
        lambda mask: mask != 0,
        lambda mask: 1.0 - mask.to(torch.float32),
        lambda mask: torch.where(mask, 0.0, 1.0),
        lambda mask: torch.cat([mask, mask], dim=-1),
        lambda mask: torch.zeros(2, 1, 4, 9).masked_fill(mask, 1.0),
        lambda mask: mask.expand(2, 3, 4, 9),
        lambda mask: mask[..., ::2],
        lambda mask: mask[:1, :, :, :],
        lambda mask: mask.mT,
    ],
)
def test_computes_as_a_tensor(use):
    mask, dense = _mask(), _mask().dense()
    result = use(mask)
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, use(dense))
    # Whoever has the tensor may write to it: from then on it counts.
    assert mask.for_call(4, 9) is None


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.masked_fill_(torch.ones(9, dtype=torch.bool), False),
        lambda mask: mask.__setitem__((slice(None), slice(None), slice(None), 3), False),
        lambda mask: mask[:, 0].fill_(False),
        lambda mask: torch.logical_not(mask, out=mask.data),
    ],
)
def test_writes_are_not_lost(write):
    mask, dense = _mask(), _mask().dense().clone()
    write(mask)
    write(dense)
    assert mask.for_call(4, 9) is None
    assert torch.equal(mask.dense(), dense)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(-1, None), slice(None)),
        (slice(None), slice(None), slice(1, 3), slice(None)),
        (slice(None), slice(None), slice(None), slice(None, 9)),
        (slice(None), slice(None), slice(0, 2), slice(None, 7)),
    ],
)
def test_parts_stay_descriptions(index):
    mask = _mask()
    part, dense = mask[index], mask.dense()[index]
    assert isinstance(part, StructuredMask)
    assert part.shape == dense.shape
    call = part.for_call(*part.shape[2:])
    assert torch.equal(_expand(call, *part.shape[2:]), dense)
    assert torch.equal(part.dense(), dense)


def test_other_lengths_need_the_tensor():
    assert _mask().for_call(3, 9) is None
    assert _mask().for_call(4, 10) is None


def test_tensor_is_built_once():
    built = []
    form = DenseForm(lambda: built.append(1) or torch.ones(1))
    assert form.tensor() is form.tensor()
    assert built == [1]
