"""Multi-head latent attention reads its cache as it is where that is exact, and is left alone elsewhere."""

from __future__ import annotations

import copy
import pickle
from types import MethodType

import pytest
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import subquad.hf
from subquad.hf import attention as attention_module
from subquad.hf import mla

NAME = "deepseek-v3"
NEW_TOKENS = 10
MODES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "pieces": {"prefill_chunk_size": 5},
}


@pytest.fixture
def model(decoder):
    model = decoder(NAME)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def past(model, make_batch, extend):
    """Returns a function that runs the first tokens, and one that runs the next one; both with one cache."""
    batch = make_batch(20, left=4)
    cache = subquad.hf.GrowingCache(config=model.config)
    with torch.no_grad():
        extend(model, cache, batch.ids[:, :19], batch.mask[:, :19])
    return lambda of=model: extend(of, copy.deepcopy(cache), batch.ids[:, 19:], batch.mask)


@pytest.fixture
def shapes(monkeypatch):
    """Records the shapes of queries, keys and values that reach the kernel."""
    recorded = []
    kernel = attention_module.attention

    def record(q, k, v, **options):
        recorded.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(attention_module, "attention", record)
    return recorded


def _layers(model):
    return [layer.self_attn for layer in model.model.layers]


def _reasons(handle):
    return [(one.count, one.reason) for one in handle.report().latent]


@pytest.mark.parametrize("mode", MODES)
def test_generate(mode, model, make_batch, assert_same):
    lookup = "lookup" in mode
    batch = make_batch(12, left=0 if lookup or mode == "pieces" else 5, size=1 if lookup else 2)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **MODES[mode]}

    def generate():
        return model.generate(batch.ids, attention_mask=batch.mask, return_dict_in_generate=True, **options)

    expected = generate()
    with subquad.hf.patch(model) as handle:
        actual = generate()
        report = handle.report()
    assert torch.equal(actual.sequences, expected.sequences)
    if "beams" not in mode:
        assert_same(torch.stack(actual.logits), torch.stack(expected.logits))
    assert not report.delegated
    # Without a cache there is nothing but prompts.
    assert bool(report.on_latents) == (mode != "no cache")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_reads_the_cache_in_place(context, model, make_batch, extend, monkeypatch):
    batch = make_batch(20, size=1)
    cache = subquad.hf.GrowingCache(config=model.config)
    taken = []
    kernel = attention_module.attention

    def record(q, k, v, **options):
        taken.append((k.data_ptr(), v.data_ptr(), tuple(k.shape), tuple(v.shape)))
        return kernel(q, k, v, **options)

    with context(), subquad.hf.patch(model):
        extend(model, cache, batch.ids[:, :19], None)
        monkeypatch.setattr(attention_module, "attention", record)
        extend(model, cache, batch.ids[:, 19:], None)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    assert taken == [(place, place, (1, 20, 1, 24), (1, 20, 1, 16)) for place in places]


@torch.no_grad()
@pytest.mark.parametrize(("queries", "on_latents"), [(1, True), (16, True), (17, False)])
def test_many_queries_are_expanded(queries, on_latents, *, model, make_batch, extend, assert_same, shapes):
    batch = make_batch(42)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        extend(model, cache, batch.ids[:, :25], None)
    following = batch.ids[:, 25 : 25 + queries]
    expected = extend(model, caches[0], following, None)
    # Keys of one head with 16 + 8 columns, or of four with 8 + 8. On 41 tokens, 16 queries take 31,360 multiply-adds
    # for each head on latents and 31,488 on expanded keys and values; on 42 tokens, 17 queries take 34,000 and 33,432.
    heads, width = (1, 24) if on_latents else (4, 16)
    with subquad.hf.patch(model) as handle:
        assert_same(extend(model, caches[1], following, None), expected)
        assert handle.report().on_latents == (2 if on_latents else 0)
    assert [one[1] for one in shapes] == [(2, 25 + queries, heads, width)] * 2


def _operations(queries, tokens, rank, widths):
    """Counts multiply-adds by walking through the products of both forms."""
    products = {
        "expanded": [
            (tokens, rank, widths.nope + widths.value),
            (queries, widths.nope + widths.rot, tokens),
            (queries, tokens, widths.value),
        ],
        "absorbed": [
            (queries, widths.nope, rank),
            (queries, rank + widths.rot, tokens),
            (queries, tokens, rank),
            (queries, rank, widths.value),
        ],
    }
    return {name: sum(a * b * c for a, b, c in one) for name, one in products.items()}


@pytest.mark.parametrize("rank", [4, 8, 100, 512])
@pytest.mark.parametrize("widths", [mla._Widths(128, 64, 128), mla._Widths(8, 4, 12), mla._Widths(64, 0, 32)])
def test_count_of_operations(widths, rank):
    for queries in (1, 2, 7, 60, 170, 171, 500):
        for tokens in (1, 2, 30, 170, 1000, 100_000):
            count = _operations(queries, tokens, rank, widths)
            fewer = mla._takes_fewer_operations(queries=queries, tokens=tokens, rank=rank, widths=widths)
            assert fewer == (count["absorbed"] < count["expanded"])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, size, decoder, make_batch, extend):
    batch = make_batch(24, left=3, size=size)

    def run(model):
        cache = transformers.DynamicCache(config=model.config)
        pieces = ((0, 21), (21, 22), (22, 24))
        logits = [extend(model, cache, batch.ids[:, a:b], batch.mask[:, :b]) for a, b in pieces]
        return torch.cat(logits[1:], dim=1).double()

    # Routing to experts is discontinuous.
    options = {"first_k_dense_replace": 2}
    exact = run(decoder(NAME, **options).to(dtype).double())
    model = decoder(NAME, **options).to(dtype)
    plain = run(model)
    with subquad.hf.patch(model) as handle:
        patched = run(model)
        assert handle.report().on_latents == 4
    assert (patched - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-12


@torch.no_grad()
def test_weights_of_the_moment(model, past, assert_same):
    with subquad.hf.patch(model):
        before = past()
        for layer in _layers(model):
            layer.kv_b_proj.weight.mul_(-0.5)
        after = past()
    assert not torch.allclose(before, after, atol=1e-2)
    assert_same(after, past())


@torch.no_grad()
def test_undo(model, past):
    expected = past()
    attributes = [set(vars(layer)) for layer in _layers(model)]
    outer = subquad.hf.patch(model)
    inner = subquad.hf.patch(model)
    past()
    assert (outer.report().on_latents, inner.report().on_latents) == (2, 2)
    outer.undo()
    past()
    assert inner.report().on_latents == 4
    inner.undo()
    assert [set(vars(layer)) for layer in _layers(model)] == attributes
    assert torch.equal(past(), expected)


def test_report(model, past):
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        past()
        text = str(handle.report())
    assert "  latent caches: DeepseekV3Attention x2: read as they are, by calls of few queries\n" in text
    assert text.endswith("  computed by subquad: 2 calls\n    on latent caches: 2 calls")


class _Scaled(torch.nn.Linear):
    def forward(self, latents):
        return 2 * super().forward(latents)


def _scale(layer):
    other = _Scaled(layer.kv_b_proj.in_features, layer.kv_b_proj.out_features, bias=False)
    other.weight = layer.kv_b_proj.weight
    layer.kv_b_proj = other


def _add_bias(layer):
    layer.kv_b_proj.bias = torch.nn.Parameter(torch.ones(layer.kv_b_proj.out_features))


def _add_hook(layer):
    layer.kv_b_proj.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def _replace_forward(layer):
    layer.kv_b_proj.forward = lambda latents: 2 * torch.nn.functional.linear(latents, layer.kv_b_proj.weight)


# What is done to a layer, and what the report says if that was before the patch.
CHANGES = {
    "module": (_scale, "its kv_b_proj is a _Scaled"),
    "bias": (_add_bias, "its kv_b_proj has a bias"),
    "hook": (_add_hook, "its kv_b_proj has hooks"),
    "forward": (_replace_forward, "its kv_b_proj has hooks"),
}


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_projections(change, late, model, past, assert_same):
    apply, reason = CHANGES[change]
    plain = past()
    if not late:
        apply(_layers(model)[0])
    with subquad.hf.patch(model) as handle:
        assert _reasons(handle) == ([(2, None)] if late else [(1, reason), (1, None)])
        if late:
            apply(_layers(model)[0])
        actual = past()
        assert handle.report().on_latents == 1
        assert handle.report().computed == 2
    assert not torch.allclose(actual, plain, atol=1e-3)
    assert_same(actual, past())


class _Turned(DeepseekV3Attention):
    def expand_kv(self, kv_nope, k_rot):
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys, values.flip(-1)


class _Renamed(DeepseekV3Attention):
    def expand_kv(self, latents, rotary):
        return super().expand_kv(latents, rotary)


class _Needy(DeepseekV3Attention):
    def expand_kv(self, kv_nope, k_rot):
        return super().expand_kv(kv_nope * self.layer_idx, k_rot)


@torch.no_grad()
@pytest.mark.parametrize("cls", [_Turned, _Renamed, _Needy])
def test_classes_of_another_kind(cls, model, past, assert_same):
    for layer in _layers(model):
        layer.__class__ = cls
    expected = past()
    with subquad.hf.patch(model) as handle:
        assert _reasons(handle) == [(2, "its expand_kv is not the usual one")]
        assert_same(past(), expected)
        assert (handle.report().computed, handle.report().on_latents) == (2, 0)
        assert "x2: expanded at every call: its expand_kv is not the usual one" in str(handle.report())


@torch.no_grad()
def test_replaced_method_stays(model, past, assert_same):
    layer = _layers(model)[0]
    mine = MethodType(lambda self, kv_nope, k_rot: type(self).expand_kv(self, -kv_nope, k_rot), layer)
    layer.expand_kv = mine
    expected = past()
    with subquad.hf.patch(model) as handle:
        assert _reasons(handle) == [(1, "something else has replaced its expand_kv"), (1, None)]
        assert_same(past(), expected)
    assert vars(layer)["expand_kv"] is mine


@torch.no_grad()
def test_wide_latents(decoder):
    with subquad.hf.patch(decoder(NAME, kv_lora_rank=1020)) as handle:
        assert _reasons(handle) == [(2, "kv_lora_rank + qk_rope_head_dim is above 1024")]


@torch.no_grad()
def test_other_devices(decoder):
    model = decoder(NAME).to("meta")
    with subquad.hf.patch(model) as handle:
        model(torch.ones(1, 4, dtype=torch.long, device="meta"))
        assert _reasons(handle) == [(2, "on device meta")]


def test_gradients(model, make_batch):
    ids = make_batch(12).ids

    def gradients():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    with subquad.hf.patch(model) as handle:
        actual = gradients()
        assert handle.report().computed == 2
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("trained", ["q_b_proj", "kv_b_proj"])
def test_gradients_of_one_side(trained, model, past, assert_same):
    # All that the other side depends on is frozen.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.1.self_attn.{trained}" in name)
    expected = past()
    with subquad.hf.patch(model) as handle:
        actual = past()
        assert handle.report().delegated == ()
    weight = getattr(_layers(model)[1], trained).weight
    actual, expected = (torch.autograd.grad(logits.sum(), weight)[0] for logits in (actual, expected))
    assert_same(actual, expected)


@torch.no_grad()
def test_autocast(model, past):
    exact = past()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = past()
        with subquad.hf.patch(model) as handle:
            patched = past()
            assert (handle.report().computed, handle.report().on_latents) == (2, 0)
    assert (patched - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_compile(model, make_batch, extend, assert_same):
    ids = make_batch(12).ids
    with torch.no_grad():
        expected = model(ids).logits
        with subquad.hf.patch(model) as handle:
            compiled = torch.compile(model, backend="eager")
            assert_same(compiled(ids).logits, expected)
            assert handle.report().compiled
            assert handle.report().on_latents == 0
    torch._dynamo.reset()


@torch.no_grad()
def test_copies(model, past, assert_same):
    expected = past()
    with subquad.hf.patch(model):
        duplicate = copy.deepcopy(model)
        pickled = pickle.dumps(model)
        assert _layers(duplicate)[0].expand_kv.__self__ is _layers(duplicate)[0]
    for other in (duplicate, pickle.loads(pickled)):
        other.set_attn_implementation("eager")
        assert torch.equal(past(other), expected)
        with subquad.hf.patch(other) as handle:
            assert_same(past(other), expected)
            assert handle.report().on_latents == 2


@torch.no_grad()
def test_name_set_while_patched(model, past):
    expected = past()
    with subquad.hf.patch(model):
        model.set_attn_implementation("eager")
        assert torch.equal(past(), expected)
        assert not any(isinstance(one, mla.LatentStates) for one in _latent_states(model)[1])


def _latent_states(model):
    layer = _layers(model)[0]
    torch.manual_seed(5)
    latents, rotary = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 9, 8)
    return layer, layer.expand_kv(latents, rotary), type(layer).expand_kv(layer, latents, rotary)


@torch.no_grad()
@pytest.mark.parametrize(
    "use",
    [
        lambda keys, values: keys[..., :3],
        lambda keys, values: keys.transpose(1, 2) + 1,
        lambda keys, values: torch.cat([keys, torch.nn.functional.pad(values, (0, 4))], dim=2),
        lambda keys, values: keys.double() @ keys.mT.double(),
        lambda keys, values: values.contiguous().view(-1),
    ],
    ids=["index", "operators", "functions", "conversions", "contiguous"],
)
def test_states_are_tensors_to_other_code(use, model):
    with subquad.hf.patch(model):
        _, states, expected = _latent_states(model)
        assert [one.shape for one in states] == [one.shape for one in expected]
        assert [one.dtype for one in states] == [torch.float32] * 2
        actual, right = use(*states), use(*expected)
    assert torch.equal(actual, right)


@torch.no_grad()
def test_states_that_were_written_to_count(model):
    query = torch.randn(2, 4, 1, 16)
    with subquad.hf.patch(model) as handle:
        layer, (keys, values), expected = _latent_states(model)
        values[:, :, 3:] = 0
        expected[1][:, :, 3:] = 0
        outputs = [
            attention_module.attention_forward(layer, query, *states, None, scaling=0.3)[0]
            for states in ((keys, values), expected)
        ]
        assert (handle.report().computed, handle.report().on_latents) == (2, 0)
    assert torch.equal(*outputs)


@torch.no_grad()
def test_states_of_different_calls(model):
    query = torch.randn(2, 4, 1, 16)
    with subquad.hf.patch(model):
        layer, (keys, _), expected = _latent_states(model)
        other = layer.expand_kv(torch.randn(2, 1, 9, 16), torch.randn(2, 1, 9, 8))[1]
        actual = attention_module.attention_forward(layer, query, keys, other, None, scaling=0.3)[0]
        right = attention_module.attention_forward(layer, query, expected[0], other + 0, None, scaling=0.3)[0]
    assert torch.equal(actual, right)
