"""Compiled, exported, traced and transformed models use the original implementation."""

from __future__ import annotations

import pytest
import torch

import subquad.hf


class Logits(torch.nn.Module):
    """A model as a function of tensors only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_compile(original, decoder, make_batch, assert_same):
    model = decoder("llama", num_hidden_layers=1)
    model.set_attn_implementation(original)
    batch = make_batch(left=4)
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask}
    with torch.no_grad():
        expected = model(**arguments).logits
        with subquad.hf.patch(model) as handle:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert_same(compiled(**arguments).logits, expected, batch.mask)
            report = handle.report()
            assert report.compiled
            assert report.computed == 0
            assert "torch.compile" in str(report)
            model(**arguments)
            assert handle.report().computed == 1
        assert_same(compiled(**arguments).logits, expected, batch.mask)
    torch._dynamo.reset()


def test_compiled_layer(decoder, make_batch, assert_same):
    # The mask is built outside: the description has to survive the entry into compiled code.
    model = decoder("llama", num_hidden_layers=1)
    batch = make_batch(left=4)
    with torch.no_grad():
        expected = model(batch.ids, attention_mask=batch.mask).logits
        with subquad.hf.patch(model):
            model.model.layers[0].compile(backend="eager")
            assert_same(model(batch.ids, attention_mask=batch.mask).logits, expected, batch.mask)
    torch._dynamo.reset()


def test_export(decoder, make_batch, assert_same):
    model = decoder("llama", num_hidden_layers=1)
    ids = make_batch().ids
    with torch.no_grad():
        expected = model(ids).logits
        with subquad.hf.patch(model):
            program = torch.export.export(Logits(model), (torch.ones_like(ids),), strict=False)
        assert_same(program.module()(ids), expected)


def test_fake_tensors(decoder, make_batch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = decoder("llama")
        with torch.no_grad(), subquad.hf.patch(model) as handle:
            assert model(torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 5, 97)
            assert [(one.reason, one.calls) for one in handle.report().delegated] == [
                ("tensors of type FakeTensor", 2)
            ]


def test_recorded_operations(decoder, make_batch):
    # A kernel that torch does not see would be recorded as a constant.
    from torch.fx.experimental.proxy_tensor import make_fx

    model = decoder("llama", num_hidden_layers=1)
    query = torch.randn(1, 4, 5, 8)
    layer = model.model.layers[0].self_attn

    def run(query):
        from transformers.modeling_utils import AttentionInterface

        function = AttentionInterface._global_mapping["subquad"]
        return function(layer, query, query[:, :2], query[:, :2], None, scaling=1.0)[0]

    with torch.no_grad(), subquad.hf.patch(model):
        graph = make_fx(run)(torch.zeros_like(query))
        torch.testing.assert_close(graph(query), run(query))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(decoder):
    from transformers.modeling_utils import AttentionInterface

    model = decoder("llama", num_hidden_layers=1)
    layer = model.model.layers[0].self_attn
    queries = torch.randn(3, 1, 4, 5, 8)

    def run(query):
        function = AttentionInterface._global_mapping["subquad"]
        return function(layer, query, query[:, :2], query[:, :2], None, scaling=1.0)[0]

    with torch.no_grad(), subquad.hf.patch(model) as handle:
        expected = torch.stack([run(query) for query in queries])
        actual = torch.func.vmap(run)(queries)
        assert [one.reason for one in handle.report().delegated] == ["tracing"]
    torch.testing.assert_close(actual, expected)
