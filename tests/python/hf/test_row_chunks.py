"""RMSNorms and MLPs in chunks of tokens give what they give whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import subquad.hf
from subquad.hf import row_chunks
from subquad.hf.report import Chunked
from subquad.hf.row_chunks import use_row_chunks

_CHUNK = 4
_WIDTH = 32


@pytest.fixture
def short_chunks(monkeypatch):
    """Makes inputs of tests long."""
    monkeypatch.setattr(row_chunks, "_MLP_ROWS", _CHUNK)
    monkeypatch.setattr(row_chunks, "_NORM_ELEMENTS", _CHUNK * _WIDTH)


@pytest.fixture
def lengths(monkeypatch):
    """Records the rows of every linear layer's input."""
    seen = []
    original = nn.Linear.forward

    def forward(self, states):
        seen.append(states.shape[:-1].numel())
        return original(self, states)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return seen


def _mlp(decoder, name="gemma3"):
    return decoder(name).model.layers[0].mlp


def _states(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt-oss", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(name, dtype, decoder, make_batch):
    model = decoder(name).to(dtype)
    ids = make_batch(27).ids
    with subquad.hf.patch(model, row_chunks=False) as handle:
        assert handle.report().chunked == ()
        expected = model(ids).logits
    with subquad.hf.patch(model) as handle:
        assert handle.report().chunked
        actual = model(ids).logits
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Gemma3RMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("short_chunks")
def test_norm_is_the_same_in_every_bit(kind, dtype, transposed, batch, monkeypatch):
    norm = kind(_WIDTH).to(dtype)
    norm.weight.copy_(_states(_WIDTH))
    states = _states(batch, 13, 3, _WIDTH, dtype=dtype)
    states = states.transpose(1, 2) if transposed else states
    expected = norm(states)
    calls = []
    original = kind.forward
    use = use_row_chunks(norm)
    monkeypatch.setattr(kind, "forward", lambda self, rows: calls.append(len(rows)) or original(self, rows))
    actual = norm(states)
    use.undo()
    assert (sum(calls), max(calls)) == (batch * 13 * 3, _CHUNK)
    assert torch.equal(actual, expected)
    assert (actual.stride(), actual.dtype) == (expected.stride(), expected.dtype)


@torch.no_grad()
@pytest.mark.usefixtures("short_chunks")
def test_rows_of_an_mlp(decoder, lengths):
    mlp = _mlp(decoder)
    states = _states(2, 5, _WIDTH)
    expected = mlp(states)
    use = use_row_chunks(mlp)
    lengths.clear()
    actual = mlp(states)
    assert lengths == [4] * 6 + [2] * 3
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    use.undo()


@torch.no_grad()
@pytest.mark.parametrize(
    "states",
    [
        _states(1, _CHUNK, _WIDTH),
        _states(_WIDTH, 2, 9).permute(2, 1, 0),
        _states(9, 2, _WIDTH).transpose(0, 1),
        _states(_WIDTH),
    ],
    ids=["short", "columns", "transposed", "vector"],
)
@pytest.mark.usefixtures("short_chunks")
def test_whole_inputs(states, decoder, lengths):
    mlp = _mlp(decoder)
    expected = mlp(states)
    use = use_row_chunks(mlp)
    lengths.clear()
    assert torch.equal(mlp(states), expected)
    assert lengths == [states.shape[:-1].numel()] * 3
    use.undo()


@pytest.mark.usefixtures("short_chunks")
def test_gradients(decoder, lengths):
    mlp = _mlp(decoder)
    states = _states(1, 9, _WIDTH).requires_grad_()
    use = use_row_chunks(mlp)
    lengths.clear()
    mlp(states).sum().backward()
    assert lengths == [9] * 3
    assert states.grad is not None
    use.undo()


@torch.no_grad()
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "replaced"])
def test_layers_that_are_watched_or_replaced(change, decoder, lengths):
    """What changes after the patch counts, too."""
    mlp = _mlp(decoder)
    use = use_row_chunks(mlp)
    lengths.clear()
    if change == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: None)
    elif change == "pre-hook":
        mlp.up_proj.register_forward_pre_hook(lambda *_: None)
    elif change == "forward":
        mlp.up_proj.forward = mlp.up_proj.forward
    else:
        mlp.up_proj = type("Other", (nn.Linear,), {})(_WIDTH, 48, bias=False)
    mlp(_states(1, 9, _WIDTH))
    assert lengths == [9] * 3
    use.undo()


@torch.no_grad()
@pytest.mark.usefixtures("short_chunks")
def test_keyword_argument(decoder, lengths):
    mlp = _mlp(decoder)
    use = use_row_chunks(mlp)
    lengths.clear()
    mlp(x=_states(1, 9, _WIDTH))
    assert lengths == [9] * 3
    use.undo()


class _MeanOfTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_WIDTH))
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)


class _Mixing(nn.Module):
    def __init__(self, act="silu"):
        super().__init__()
        self.proj = nn.Linear(_WIDTH, _WIDTH)
        self.act = ACT2FN[act]

    def forward(self, x):
        return self.act(self.proj(x)) * self.proj(x[:, :1])


class _WithSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(_WIDTH, _WIDTH)
        self.act = nn.Softmax(dim=1)

    def forward(self, x):
        return self.act(self.proj(x))


class _WithArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x, scale=None):
        return self.proj(x) if scale is None else self.proj(x) * scale


@pytest.mark.parametrize("kind", [_MeanOfTokens, _Mixing, _WithSoftmax, _WithArgument])
def test_other_modules_stay(kind):
    module = kind()
    use = use_row_chunks(module)
    assert not use.counts
    assert "forward" not in vars(module)


@pytest.mark.parametrize("change", ["meta", "own forward", "hook"])
def test_modules_that_stay(change, decoder):
    mlp = _mlp(decoder)
    if change == "meta":
        mlp.to("meta")
    elif change == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: None)
    else:
        mlp.forward = own = mlp.forward
    assert not use_row_chunks(mlp).counts
    assert "forward" not in vars(mlp) or mlp.forward is own


def test_undo_restores_the_same_objects(decoder):
    model = decoder("gemma3")
    before = {module: dict(vars(module)) for module in model.modules()}
    handle = subquad.hf.patch(model)
    assert "forward" in vars(model.model.norm)
    handle.undo()
    for module, attributes in before.items():
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items() if name != "config")


def test_nested(decoder):
    model = decoder("gemma3")
    outer, inner = subquad.hf.patch(model), subquad.hf.patch(model)
    assert inner.report().chunked == outer.report().chunked
    outer.undo()
    assert "forward" in vars(model.model.norm)
    inner.undo()
    inner.undo()
    assert "forward" not in vars(model.model.norm)


def test_forward_set_while_patched(decoder):
    model = decoder("gemma3")
    with subquad.hf.patch(model):
        model.model.norm.forward = own = lambda states: states
    assert vars(model.model.norm)["forward"] is own


def test_report(decoder):
    model = decoder("gemma3")
    with subquad.hf.patch(model) as handle:
        report = handle.report()
    assert report.chunked == (Chunked("Gemma3RMSNorm", 13), Chunked("Gemma3MLP", 2))
    assert "  long inputs in chunks: Gemma3RMSNorm x13, Gemma3MLP x2\n" in str(report)
    with subquad.hf.patch(model, row_chunks=False) as handle:
        assert "in chunks" not in str(handle.report())


@torch.no_grad()
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied, decoder):
    mlp = _mlp(decoder)
    states = _states(1, 9, _WIDTH)
    expected = mlp(states)
    use = use_row_chunks(mlp)
    duplicate = copied(mlp)
    use.undo()
    mlp.up_proj.weight.zero_()
    torch.testing.assert_close(duplicate(states), expected)


@torch.no_grad()
def test_peak_of_an_mlp(decoder, monkeypatch):
    """The widest tensor there is belongs to a chunk."""
    monkeypatch.setattr(row_chunks, "_MLP_ROWS", 64)
    mlp = _mlp(decoder)
    widest = []
    original = type(mlp.act_fn).forward

    def forward(self, states):
        widest.append(states.shape)
        return original(self, states)

    monkeypatch.setattr(type(mlp.act_fn), "forward", forward)
    use = use_row_chunks(mlp)
    widest.clear()
    mlp(_states(1, 200, _WIDTH))
    assert [tuple(shape) for shape in widest] == [(64, 48)] * 3 + [(8, 48)]
    use.undo()


def test_widths_of_one_class_are_tried_apart(decoder):
    model = decoder("qwen3")
    with subquad.hf.patch(model):
        assert "forward" in vars(model.model.norm)
        assert "forward" in vars(model.model.layers[0].self_attn.q_norm)
