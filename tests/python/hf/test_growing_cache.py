"""`GrowingCache` holds what `DynamicCache` holds, without copying all of it for every token."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import random
import weakref

import pytest
import torch
import transformers
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from subquad.hf import growing_layers
from subquad.hf.growing_cache import GrowingCache, use_in_generate
from subquad.hf.growing_layers import GrowingLayer, GrowingSlidingWindowLayer, growing

NEW_TOKENS = 24
WINDOW = 8
MODELS = ["llama", "qwen3", "mistral-window", "gemma3", "phi3"]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "beams of samples": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 5},
}
SEAM = "_prepare_cache_for_generation"


@pytest.fixture
def model(request, decoder):
    return decoder(request.param)


def _generate(model, batch, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **options}
    result = model.generate(
        batch.ids, attention_mask=batch.mask, return_dict_in_generate=True, disable_compile=True, **options
    )
    return result, getattr(result, "cache", None) or result.past_key_values


def _assert_same_cache(actual, expected):
    assert type(actual) is GrowingCache
    assert type(expected) is DynamicCache
    assert len(actual) == len(expected)
    assert actual.get_seq_length() == expected.get_seq_length()
    for (k, v, *_), (k_expected, v_expected, *_) in zip(actual, expected, strict=True):
        torch.testing.assert_close(k, k_expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v, v_expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_generate(model, mode, make_batch):
    # The mask of a chunk covers the chunks so far only with transformers' own slicing of it.
    batch = make_batch(12, left=0 if "chunk" in mode else 5)
    expected, cache_expected = _generate(model, batch, **MODES[mode])
    with use_in_generate(model) as handle:
        assert handle.reason is None
        actual, cache = _generate(model, batch, **MODES[mode])
    assert torch.equal(actual.sequences, expected.sequences)
    _assert_same_cache(cache, cache_expected)
    if "num_beams" not in MODES[mode]:
        layer = cache.layers[-1]
        assert layer.capacity >= layer.keys.shape[2]


@pytest.mark.parametrize("mode", ["assistant", "assistant samples", "prompt lookup"])
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_assisted(model, mode, decoder, make_batch):
    batch = make_batch(6, size=1)
    batch = type(batch)(batch.ids.repeat(1, 3), batch.mask.repeat(1, 3))
    options = {"prompt_lookup_num_tokens": 3}
    assistant = decoder("llama", num_hidden_layers=1)
    if mode != "prompt lookup":
        options = {"assistant_model": assistant, "do_sample": "samples" in mode}
    expected, cache_expected = _generate(model, batch, **options)
    with use_in_generate(model), use_in_generate(assistant):
        actual, cache = _generate(model, batch, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    _assert_same_cache(cache, cache_expected)


def test_encoder_decoder(make_batch):
    config = transformers.T5Config(
        vocab_size=97,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = make_batch(9, left=2)
    expected, _ = _generate(model, batch, num_beams=2)
    with use_in_generate(model):
        actual, cache = _generate(model, batch, num_beams=2)
    assert torch.equal(actual.sequences, expected.sequences)
    assert type(cache.self_attention_cache) is GrowingCache
    assert type(cache.cross_attention_cache) is DynamicCache


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_forward_in_pieces(model, make_batch, extend):
    ids = make_batch(40).ids
    caches = GrowingCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in ids.split([13, 20, 1, 1, 1, 4], dim=1):
            actual, expected = (extend(model, cache, piece, None) for cache in caches)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    _assert_same_cache(*caches)


def _states(added, *, size=2, heads=3, dtype=torch.float32):
    # As of a projection: the axes of heads and tokens are transposed.
    k, v = (torch.randn(size, added, heads, dim, dtype=dtype).transpose(1, 2) for dim in (4, 6))
    return k, v


def _layers(kind):
    if kind is DynamicLayer:
        return GrowingLayer(), DynamicLayer()
    return GrowingSlidingWindowLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)


def _assert_same_layer(actual, expected):
    assert actual.get_seq_length() == expected.get_seq_length()
    assert actual.get_mask_sizes(3) == expected.get_mask_sizes(3)
    for name in ("keys", "values"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def _draw_operation(draw, kind, *, size, heads):
    """Returns the name and the arguments of a method of a layer, and the batch size after it."""
    name = draw.choice(
        ["update"] * 16
        + ["crop"] * 4
        + ["reorder_cache"] * 2
        + ["record", "reset", "batch_repeat_interleave", "batch_select_indices"]
    )
    if name == "batch_repeat_interleave" and size > 2:
        name = "batch_select_indices"
    if name == "record" and kind is DynamicLayer:
        name = "reset"
    arguments = {
        "update": lambda: _states(draw.choice([1, 1, 1, 2, 5, WINDOW, 30]), size=size, heads=heads),
        "crop": lambda: (-draw.choice([0, 1, 1, 2, 5, 40 if kind is DynamicLayer else 3]),),
        "reorder_cache": lambda: (torch.tensor([draw.randrange(size) for _ in range(size)]),),
        "record": lambda: (draw.random() < 0.5,),
        "reset": lambda: (),
        "batch_repeat_interleave": lambda: (2,),
        "batch_select_indices": lambda: (torch.tensor([size - 1, 0]),),
    }[name]()
    return name, arguments, {"batch_repeat_interleave": size * 2, "batch_select_indices": 2}.get(name, size)


def _apply(layer, name, arguments):
    if name == "record":
        layer.record_past = arguments[0]
        return None
    try:
        return getattr(layer, name)(*arguments)
    except RuntimeError as error:
        assert name == "crop"
        return str(error)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_random_operations(kind, seed, heads, context):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    actual, expected = _layers(kind)
    size = 2
    with context():
        for _ in range(150):
            name, arguments, size_after = _draw_operation(draw, kind, size=size, heads=heads)
            if expected.get_seq_length() == 0 and name != "update":
                # Empty layers keep their batch size, and those without any tensor cannot be cropped.
                continue
            size = size_after
            results = [_apply(layer, name, arguments) for layer in (actual, expected)]
            if name == "update":
                assert all(map(torch.equal, *results))
            else:
                assert results[0] == results[1]
            _assert_same_layer(actual, expected)
            if draw.random() < 0.05:
                actual = copy.deepcopy(actual)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_appends_in_place(kind):
    layer, _ = _layers(kind)
    addresses, tokens = [], []
    for _ in range(1000):
        states = _states(1)
        k, v = layer.update(*states)
        tokens.append(k)
        assert k.stride() == (3 * layer.capacity * 4, layer.capacity * 4, 4, 1)
        assert v.stride() == (3 * layer.capacity * 6, layer.capacity * 6, 6, 1)
        assert layer.capacity <= max(2 * k.shape[2], k.shape[2] + 16)
        address = layer.keys.untyped_storage().data_ptr()
        if not addresses or addresses[-1] != address:
            addresses.append(address)
    # 17, 36, 74, 150, 302, 606 and 1214 tokens; a window moves on by 8 or more.
    assert len(addresses) <= (7 if kind is DynamicLayer else 1000 / 8 + 1)
    # Views from before show what they did, also across new buffers.
    for older, newer in itertools.pairwise(tokens):
        common = min(older.shape[2], newer.shape[2] - 1)
        assert torch.equal(older[:, :, older.shape[2] - common :], newer[:, :, -1 - common : -1])


def _held_bytes(cache):
    return sum(
        states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, 17), (100, 116), (128, 144), (4096, 4608), (8192, 9216), (20_000, 21_024)]
)
def test_first_buffer(tokens, capacity):
    """Right after a prompt, little more is held than the prompt."""
    layer = GrowingLayer()
    layer.update(*_states(tokens, size=1))
    assert layer.capacity == capacity
    for _ in range(capacity - tokens):
        layer.update(*_states(1, size=1))
    assert layer.capacity == capacity
    layer.update(*_states(1, size=1))
    assert layer.capacity == 2 * (capacity + 1)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [None, 64, 500])
def test_memory_after_a_prompt(pieces, decoder, make_batch):
    model = decoder("llama", max_position_embeddings=2048)
    batch = make_batch(2000, size=1)
    options = {"max_new_tokens": 1, "output_logits": False, "prefill_chunk_size": pieces}
    _, expected = _generate(model, batch, **options)
    with use_in_generate(model):
        _, actual = _generate(model, batch, **options)
    _assert_same_cache(actual, expected)
    assert _held_bytes(actual) <= 1.13 * _held_bytes(expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("added", "copies"), [(1, 2), (5, 2), (64, 9), (500, 9)], ids=["1", "5", "64", "500"]
)
def test_copies_per_token(added, copies):
    layer = GrowingLayer()
    layer.update(*(torch.zeros(1, 1, 4096, 4) for _ in range(2)))
    copied, length = 0, 4096
    while length < 100_000:
        address = layer.keys.data_ptr()
        layer.update(*(torch.zeros(1, 1, added, 4) for _ in range(2)))
        if layer.keys.data_ptr() != address:
            copied += length
        length += added
    assert layer.get_seq_length() == length
    assert 0 < copied <= copies * length


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_appending_does_not_concatenate(kind, monkeypatch):
    layers = _layers(kind)
    prompt = _states(50)
    states = [_states(added) for added in (1, 1, 4, 1, 2) * 30]
    expected = [layers[1].update(*pair) for pair in (prompt, *states)]
    actual = [layers[0].update(*prompt)]

    def fail(*args, **kwargs):
        raise AssertionError("it concatenates")

    monkeypatch.setattr(torch, "cat", fail)
    actual += [layers[0].update(*pair) for pair in states]
    monkeypatch.undo()
    for one, other in zip(actual, expected, strict=True):
        assert all(map(torch.equal, one, other))
    if kind is DynamicSlidingWindowLayer:
        assert layers[0].capacity <= WINDOW - 1 + 4 + 16


@torch.no_grad()
def test_large_buffers_grow_less(monkeypatch):
    layers = GrowingLayer(), GrowingLayer()
    for layer in layers:
        layer.update(*_states(100))
    layers[0].update(*_states(20))
    monkeypatch.setattr(growing_layers, "_DOUBLING_BYTES", 2 * 3 * 4 * 4 * 119)
    layers[1].update(*_states(20))
    assert [layer.capacity for layer in layers] == [240, 180]


@torch.no_grad()
@pytest.mark.parametrize("configured", [False, True])
def test_reserve(configured, decoder):
    cache = GrowingCache(config=decoder("gemma3").config if configured else None)
    cache.reserve(500)
    cache.update(*_states(3), 1)
    address = cache.layers[1].keys.data_ptr()
    for _ in range(497):
        cache.update(*_states(1), 1)
    assert cache.layers[1].capacity == 500
    assert cache.layers[1].keys.data_ptr() == address


@torch.no_grad()
def test_crop_keeps_the_buffer():
    layer = GrowingLayer()
    layer.update(*_states(20))
    address = layer.keys.data_ptr()
    layer.crop(-5)
    states = _states(7)
    k, _ = layer.update(*states)
    assert k.data_ptr() == address
    assert torch.equal(k[:, :, 15:], states[0])


@torch.no_grad()
def test_assigned_tensors_are_not_written():
    layer = GrowingLayer()
    layer.update(*_states(4))
    mine = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 6)
    layer.keys, layer.values = (tensor[:, :, :5] for tensor in mine)
    before = [tensor.clone() for tensor in mine]
    k, _ = layer.update(*_states(1))
    assert k.shape[2] == 6
    assert all(map(torch.equal, mine, before))
    # Nor does a layer write into the buffer of another one.
    other = GrowingLayer()
    other.update(*_states(1))
    other.keys, other.values = layer.keys, layer.values
    appended, appended_other = _states(1), _states(1)
    k_other = torch.cat([layer.keys, appended_other[0]], dim=2)
    layer.update(*appended)
    other.update(*appended_other)
    assert torch.equal(layer.keys[:, :, -1:], appended[0])
    assert torch.equal(other.keys, k_other)


@torch.no_grad()
@pytest.mark.parametrize(
    "part",
    [
        lambda states: states[:, :, ::2],
        lambda states: states[:, :, 3:],
        lambda states: states[1:],
        lambda states: states[:, :2],
        lambda states: states[:, :, :0],
    ],
    ids=["every other", "last", "row", "heads", "none"],
)
def test_assigned_parts(part):
    layers = GrowingLayer(), DynamicLayer()
    states = _states(9)
    for layer in layers:
        layer.update(*states)
        layer.keys, layer.values = part(layer.keys), part(layer.values)
    added = [torch.randn(*tensor.shape[:2], 4, tensor.shape[3]) for tensor in map(part, states)]
    assert all(map(torch.equal, *(layer.update(*added) for layer in layers)))
    _assert_same_layer(*layers)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies(copied, decoder):
    config = decoder("gemma3").config
    caches = GrowingCache(config=config), DynamicCache(config=config)
    for _ in range(20):
        states = _states(1)
        for cache in caches:
            cache.update(*states, 0)
            cache.update(*states, 1)
    duplicate = copied(caches[0])
    for layer, original in zip(duplicate.layers, caches[0].layers, strict=True):
        assert type(layer) is type(original)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    caches[0].update(*_states(1), 0)
    assert duplicate.get_seq_length() == 20
    states = _states(1)
    for cache in (duplicate, caches[1]):
        cache.update(*states, 0)
        cache.update(*states, 1)
    _assert_same_cache(duplicate, caches[1])


def test_shallow_copy_of_a_layer():
    with torch.no_grad():
        layer = GrowingLayer()
        layer.update(*_states(3))
        duplicate = copy.copy(layer)
        states = _states(1)
        layer.update(*states)
        duplicate.update(*_states(1))
    assert torch.equal(layer.keys[:, :, -1:], states[0])


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicSlidingWindowLayer])
def test_gradients(kind):
    results = []
    for layer in _layers(kind):
        torch.manual_seed(0)
        with torch.no_grad():
            layer.update(*_states(5))
        inputs = [[tensor.requires_grad_() for tensor in _states(1)] for _ in range(4)]
        loss = torch.zeros(())
        for k, v in inputs:
            k_all, v_all = layer.update(k, v)
            loss = loss + (k_all.sin().sum() * v_all.cos().sum())
        results.append(torch.autograd.grad(loss, [one for pair in inputs for one in pair]))
        with torch.no_grad():
            layer.update(*_states(1))
            assert not layer.update(*_states(1))[0].requires_grad
    assert all(map(torch.equal, *results))


def test_saved_for_backward():
    """The query needs a gradient, the keys, of frozen weights, do not."""
    layer = GrowingLayer()
    query = torch.randn(2, 3, 1, 4, requires_grad=True)
    k, _ = layer.update(*_states(3))
    scores = query @ k.mT
    with torch.no_grad():
        layer.update(*_states(1))
        layer.update(*_states(1))
    scores.sum().backward()
    assert torch.equal(query.grad, k.sum(2, keepdim=True))


def test_leaving_inference_mode():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*_states(3))
        layer.update(*_states(1))
    with torch.no_grad():
        assert layer.update(*_states(1))[0].shape[2] == 5
        assert layer.update(*_states(1))[0].shape[2] == 6


def test_fake_tensors():
    with torch.no_grad(), torch._subclasses.FakeTensorMode():
        layer = GrowingLayer()
        layer.update(*_states(3))
        layer.crop(-1)
        assert layer.update(*_states(1))[0].shape == (2, 3, 3, 4)
        assert layer.capacity == 0


@torch.no_grad()
def test_compiled():
    layers = GrowingLayer(), DynamicLayer()
    update = torch.compile(layers[0].update, backend="eager", fullgraph=True)
    layers[0].update(*_states(2))
    layers[1].update(layers[0].keys, layers[0].values)
    states = _states(1)
    assert all(map(torch.equal, update(*states), layers[1].update(*states)))
    assert layers[0].capacity == 0
    layers[0].update(*_states(1))
    assert layers[0].capacity == 20


@torch.no_grad()
def test_mismatch():
    """What `torch.cat` promotes or refuses."""
    for layer in _layers(DynamicLayer):
        layer.update(*_states(2))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            layer.update(*_states(1, size=3))
        assert layer.get_seq_length() == 2
        assert layer.update(*_states(1, dtype=torch.float64))[0].dtype == torch.float64


def _content(cache):
    """All that a cache holds, as copies."""

    def copied(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    return [
        {
            **{
                name: copied(value) for name, value in vars(layer).items() if name not in ("_keys", "_values")
            },
            "keys": copied(layer.keys),
            "values": copied(layer.values),
            "capacity": layer.capacity,
        }
        for layer in cache.layers
    ]


def _assert_same_content(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda x, y: x == y
            assert same(value, other[name]), name


def _mixed_cache(kind, decoder):
    config = decoder("gemma3", layer_types=["full_attention", "sliding_attention"]).config
    return kind(config=config)


def _fill(*caches, tokens=1):
    states = _states(tokens)
    for cache in caches:
        for index in range(2):
            cache.update(*states, index)


FAILURES = {
    "batch of keys": lambda cache, index: cache.update(_states(1, size=3)[0], _states(1)[1], index),
    "batch of values": lambda cache, index: cache.update(_states(1)[0], _states(1, size=3)[1], index),
    "dimension of values": lambda cache, index: cache.update(*_states(1)[:1] * 2, index),
    "axes of values": lambda cache, index: cache.update(_states(1)[0], torch.zeros(1), index),
    "many values": lambda cache, index: cache.update(_states(40)[0], _states(40, size=3)[1], index),
    "no values": lambda cache, index: cache.update(_states(1)[0], None, index),
    "no keys": lambda cache, index: cache.update(None, _states(1)[1], index),
    "no such layer": lambda cache, index: cache.update(*_states(1), 2 + index),
    "crop of a window": lambda cache, index: cache.crop(-3),
    "crop to a length": lambda cache, index: cache.crop(3),
    "no such beam": lambda cache, index: cache.reorder_cache(torch.tensor([0, 7])),
    "beams of another type": lambda cache, index: cache.reorder_cache(torch.tensor([0.5, 1.0])),
    "no such row": lambda cache, index: cache.batch_select_indices(torch.tensor([0, 7])),
    "negative repeats": lambda cache, index: cache.batch_repeat_interleave(-1),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_errors_change_nothing(context, index, failure, decoder):
    actual, expected = (_mixed_cache(kind, decoder) for kind in (GrowingCache, DynamicCache))
    with context():
        for tokens in (20, 1, 1):
            _fill(actual, expected, tokens=tokens)
        before = _content(actual)
        with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError, TypeError)):
            FAILURES[failure](actual, index)
        _assert_same_content(_content(actual), before)
        for _ in range(20):
            _fill(actual, expected)
    _assert_same_cache(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("configured", [True, False])
def test_errors_leave_an_empty_cache_empty(configured, decoder):
    cache = _mixed_cache(GrowingCache, decoder) if configured else GrowingCache()
    before = _content(cache)
    for index in (0, 1):
        with pytest.raises((AttributeError, TypeError)):
            cache.update(_states(1)[0], None, index)
    _assert_same_content(_content(cache), before)
    assert len(cache) == (2 if configured else 0)
    expected = _mixed_cache(DynamicCache, decoder) if configured else DynamicCache()
    _fill(cache, expected)
    _assert_same_cache(cache, expected)


@torch.no_grad()
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_failures_on_the_way(calls, error, decoder, monkeypatch):
    """The keys are stored already, or both."""
    actual, expected = (_mixed_cache(kind, decoder) for kind in (GrowingCache, DynamicCache))
    for tokens in (20, 1):
        _fill(actual, expected, tokens=tokens)
    before = _content(actual)
    original = growing_layers._Span.append
    left = [calls]

    def fail(span, *args, **kwargs):
        result = original(span, *args, **kwargs)
        left[0] -= 1
        if not left[0]:
            raise error
        return result

    monkeypatch.setattr(growing_layers._Span, "append", fail)
    states = _states(1)
    done = 0
    with pytest.raises(error):  # noqa: PT012
        for index in (0, 1):
            actual.update(*states, index)
            before, done = _content(actual), done + 1
    _assert_same_content(_content(actual), before)
    monkeypatch.undo()
    for index in (0, 1):
        expected.update(*states, index)
        if index >= done:
            actual.update(*states, index)
    for _ in range(20):
        _fill(actual, expected)
    _assert_same_cache(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_select_indices", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 1),
    ],
)
def test_changes_of_rows_free_layer_by_layer(name, argument):
    cache = GrowingCache()
    for index in range(3):
        cache.update(*_states(4), index)
    first = weakref.ref(cache.layers[0]._keys.buffer)
    freed = []

    class Watching(GrowingLayer):
        def get_seq_length(self):
            freed.append(first() is None)
            return super().get_seq_length()

    cache.layers[2] = Watching()
    cache.update(*_states(4), 2)
    freed.clear()
    getattr(cache, name)(argument)
    assert freed[0]


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
def test_narrow_windows(window):
    layers = GrowingSlidingWindowLayer(window), DynamicSlidingWindowLayer(window)
    for _ in range(40):
        states = _states(1)
        results = [layer.update(*states)[0] for layer in layers]
        assert torch.equal(*results)
        _assert_same_layer(*layers)


@torch.no_grad()
def test_content_from_another_cache():
    source = DynamicCache()
    source.update(*_states(4), 0)
    for cache in (GrowingCache(list(source)), GrowingCache.adopt(source)):
        states = _states(1)
        k, _ = cache.update(*states, 0)
        assert torch.equal(k, torch.cat([source.layers[0].keys, states[0]], dim=2))
        assert type(cache.layers[0]) is GrowingLayer
    cache.update(*_states(1), 2)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
    with pytest.raises(TypeError, match=r"expected a transformers\.DynamicCache, got GrowingCache"):
        GrowingCache.adopt(cache)


def test_layers_of_other_kinds_stay():
    layer = LinearAttentionLayer()
    assert growing(layer) is layer
    with pytest.raises(ValueError, match="offloading"):
        GrowingCache(offloading=True)
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    cache = GrowingCache(config=config)
    assert {type(layer) for layer in cache.layers} == {LinearAttentionLayer, GrowingLayer}
    assert not GrowingCache(config=transformers.MambaConfig(num_hidden_layers=2)).is_compileable


def test_undo(decoder, make_batch):
    model = decoder("llama")
    batch = make_batch(5)
    attributes = dict(vars(model))
    first, second, third = (use_in_generate(model) for _ in range(3))
    duplicate = copy.deepcopy(model)
    assert type(_generate(duplicate, batch)[1]) is GrowingCache
    assert vars(duplicate)[SEAM].__self__ is duplicate
    assert type(_generate(pickle.loads(pickle.dumps(model)), batch)[1]) is DynamicCache
    first.undo()
    first.undo()
    assert not first.active
    assert second.active
    second.undo()
    assert type(_generate(model, batch)[1]) is GrowingCache
    third.undo()
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[name] is value for name, value in attributes.items())
    assert type(_generate(model, batch)[1]) is DynamicCache
    with use_in_generate(duplicate):
        pass
    assert SEAM not in vars(duplicate)


def test_other_caches_stay(decoder, make_batch):
    model = decoder("llama")
    batch = make_batch(5)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    mine = DynamicCache(config=model.config)
    with use_in_generate(model):
        assert _generate(model, batch, **{name: mine})[1] is mine
        static = _generate(model, batch, cache_implementation="static")[1]
        assert isinstance(static, transformers.StaticCache)
        assert model.generate(batch.ids, use_cache=False, max_new_tokens=2).shape == (2, 7)


def test_left_alone(decoder):
    model = decoder("gemma4")
    for one, reason in ((model, "num_kv_shared_layers"), (decoder("llama").model, "no generate")):
        before = dict(vars(one))
        handle = use_in_generate(one)
        assert reason in handle.reason
        assert not handle.active
        assert vars(one) == before
        handle.undo()
    model = decoder("llama")
    theirs = model._prepare_cache_for_generation
    setattr(model, SEAM, theirs)
    handle = use_in_generate(model)
    assert "something else" in handle.reason
    handle.undo()
    assert vars(model)[SEAM] is theirs
