"""Where stand-ins are, for whom they compute, and how they go."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_next import modeling_qwen3_next as file

import subquad.hf
from subquad.hf.recurrent import recurrent_modules
from subquad.hf.stand_ins import StandIn

from .models import build, distance, in_parts, whole

KIND = "qwen3_next"
CHUNK, STEP = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
ORIGINALS = {name: getattr(file, name) for name in (CHUNK, STEP)}
CALLS = "chunk_gated_delta_rule"


def _functions():
    return {name: getattr(file, name) for name in ORIGINALS}


def _are_original():
    return all(getattr(file, name) is original for name, original in ORIGINALS.items())


def _calls(handle):
    """Returns how often the chunked rule was computed by subquad."""
    return handle.report().computed_recurrent.get(CALLS, 0)


def _layer(model):
    (layer,) = recurrent_modules(model)
    return layer


@pytest.fixture
def model():
    return build(KIND)


def test_undo(model):
    layer = _layer(model)
    before = dict(vars(layer))
    handle = subquad.hf.patch(model)
    for name, original in ORIGINALS.items():
        stand_in = getattr(file, name)
        assert isinstance(stand_in, StandIn)
        assert stand_in.__wrapped__ is original
        assert inspect.unwrap(stand_in) is inspect.unwrap(original)
        assert stand_in.__name__ == name
        assert inspect.signature(stand_in) == inspect.signature(original)
    handle.undo()
    assert _are_original()
    assert vars(layer) == before
    handle.undo()
    assert _are_original()


def test_two_patched_models_and_one_that_is_not():
    first, second, third = (build(KIND) for _ in range(3))
    with torch.no_grad():
        expected = whole(third)
        one, other = subquad.hf.patch(first), subquad.hf.patch(second)
        functions = _functions()
        assert torch.equal(whole(third), expected)
        assert _calls(one) == _calls(other) == 0
        assert distance(whole(first), expected) < 2e-5
        assert (_calls(one), _calls(other)) == (1, 0)
        one.undo()
        assert _functions() == functions
        assert torch.equal(whole(first), expected)
        assert not torch.equal(whole(second), expected)
        assert _calls(other) == 1
        other.undo()
    assert _are_original()


def test_model_patched_twice(model):
    outer, inner = subquad.hf.patch(model), subquad.hf.patch(model)
    with torch.no_grad():
        whole(model)
        outer.undo()
        assert not _are_original()
        whole(model)
    assert _calls(outer) == 1
    assert _calls(inner) == 2
    inner.undo()
    assert _are_original()
    assert "forward" not in vars(_layer(model))


def test_model_inside_a_patched_model(model):
    with torch.no_grad(), subquad.hf.patch(model.model) as inner, subquad.hf.patch(model) as outer:
        whole(model)
        assert _calls(inner) == _calls(outer) == 1
    assert _are_original()


def test_model_dropped_without_undo():
    model = build(KIND)
    subquad.hf.patch(model)
    assert not _are_original()
    del model
    gc.collect()
    assert _are_original()


def test_failure_in_forward(model):
    with torch.no_grad(), subquad.hf.patch(model) as handle:
        with pytest.raises(Exception, match="mat1 and mat2"):
            _layer(model)(torch.zeros(1, 3, 5))
        # Nothing counts as running any more.
        query = torch.ones(1, 2, 1, 4)
        getattr(file, CHUNK)(query, query, query, -query[..., 0], query[..., 0])
        assert _calls(handle) == 0


def test_failure_while_patching(model):
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        subquad.hf.patch(model)
    assert _are_original()
    assert "forward" not in vars(_layer(model))


def test_what_others_put_there_stays(model, monkeypatch):
    def replacement(*args, **kwargs):
        return ORIGINALS[CHUNK](*args, **kwargs)

    handle = subquad.hf.patch(model)
    with monkeypatch.context() as patched:
        patched.setattr(file, CHUNK, replacement)
        handle.undo()
        assert getattr(file, CHUNK) is replacement
        assert getattr(file, STEP) is ORIGINALS[STEP]
    # What had been there when the other came along has no patch left, and computes as the original.
    with torch.no_grad():
        assert getattr(file, CHUNK).__wrapped__ is ORIGINALS[CHUNK]
        whole(model)
    setattr(file, CHUNK, ORIGINALS[CHUNK])


def test_function_with_other_parameters_stays(model, monkeypatch):
    def another(query, key, value, decay, beta):
        raise NotImplementedError

    monkeypatch.setattr(file, CHUNK, another)
    with subquad.hf.patch(model) as handle:
        assert getattr(file, CHUNK) is another
        assert isinstance(getattr(file, STEP), StandIn)
        (layers,) = handle.report().recurrent
        assert CALLS not in layers.operators


def test_forward_set_by_others(model):
    layer = _layer(model)
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = forward
    with torch.no_grad():
        expected = whole(model)
        with subquad.hf.patch(model) as handle:
            assert distance(whole(model), expected) < 1e-5
            report = handle.report()
    assert layer.forward is forward
    assert report.recurrent == ()
    assert [(one.name, one.reason) for one in report.left_alone] == [
        ("Qwen3NextGatedDeltaNet", "something else has shadowed its method")
    ]
    assert len(calls) == 2


def test_copy_and_pickle_of_a_patched_model(model):
    with torch.no_grad():
        expected = whole(model)
        with subquad.hf.patch(model) as handle:
            duplicate = copy.deepcopy(_layer(model))
            unpickled = pickle.loads(pickle.dumps(_layer(model)))
            states = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
            wanted = _layer(model)(states)
            assert torch.equal(duplicate(states), wanted)
            assert distance(unpickled(states), wanted) < 1e-5
            # What is unpickled has counts of its own.
            assert _calls(handle) == 2
        assert distance(duplicate(states), wanted) < 1e-5
        assert torch.equal(whole(model), expected)
        # What a pickle holds is no obstacle to a patch.
        model.model.layers[0].linear_attn = unpickled
        with subquad.hf.patch(model) as handle:
            assert distance(whole(model), expected) < 2e-5
            assert _calls(handle) == 1


def test_compile(model):
    layer = _layer(model)
    states = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(states)
        with subquad.hf.patch(model) as handle:
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            assert distance(compiled(states), expected) < 1e-5
            report = handle.report()
            assert report.compiled
            assert report.computed_recurrent == {}
            layer(states)
            assert _calls(handle) == 1
        assert distance(compiled(states), expected) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_are_the_originals_matter(name, model):
    query = torch.ones(1, 4, 1, 4)

    def call(module, inputs):
        with pytest.raises(ValueError, match="packed sequences apart"):
            getattr(file, CHUNK)(
                query, query, query, -query[..., 0], query[..., 0], **{name: torch.tensor([0, 4])}
            )

    with torch.no_grad(), subquad.hf.patch(model) as handle:
        hook = _layer(model).norm.register_forward_pre_hook(call)
        whole(model)
        hook.remove()
        report = handle.report()
    assert [(one.reason, one.original, one.calls) for one in report.delegated] == [
        ("packed sequences", CHUNK, 1)
    ]


def test_gradients_of_one_parameter(model):
    # Nothing but a parameter of one layer is watched by `torch.func`.
    layer = _layer(model)
    states = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def loss(bias):
        return torch.func.functional_call(layer, {"dt_bias": bias}, (states,)).square().sum()

    model.requires_grad_(False)
    bias = layer.dt_bias
    expected = torch.func.grad(loss)(bias)
    with subquad.hf.patch(model) as handle:
        assert distance(torch.func.grad(loss)(bias), expected) < 1e-4
        assert ("tracing", CHUNK) in [(one.reason, one.original) for one in handle.report().delegated]


class Bound(torch.nn.Module):
    """Keeps its functions, as layers of older transformers did."""

    def __init__(self, width):
        super().__init__()
        self.chunk_gated_delta_rule = ORIGINALS[CHUNK]
        self.recurrent_gated_delta_rule = ORIGINALS[STEP]
        self.project = torch.nn.Linear(width, 3 * width + 2)

    def forward(self, states):
        width = states.shape[-1]
        *rows, g, beta = self.project(states).split([width, width, width, 1, 1], dim=-1)
        rows = [one.unsqueeze(2) for one in rows]
        output, state = self.chunk_gated_delta_rule(
            *rows, g=-g.exp(), beta=beta.sigmoid(), output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        step, _ = self.recurrent_gated_delta_rule(
            *(one[:, :1] for one in rows), g=g[:, :1] * 0, beta=beta[:, :1].sigmoid(), initial_state=state,
            output_final_state=False, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return (output + step).squeeze(2)


class BoundModel(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config, layer=Bound):
        super().__init__(config)
        self.layer = layer(8)

    def forward(self, states):
        return self.layer(states)


def test_functions_kept_by_layers():
    torch.manual_seed(0)
    model, other = BoundModel(PreTrainedConfig()), BoundModel(PreTrainedConfig())
    states = torch.randn(2, 9, 8)
    before = dict(vars(model.layer))
    with torch.no_grad():
        expected = model(states)
        with subquad.hf.patch(model) as handle:
            assert vars(model.layer)["chunk_gated_delta_rule"].__wrapped__ is ORIGINALS[CHUNK]
            assert other.layer.chunk_gated_delta_rule is ORIGINALS[CHUNK]
            assert _are_original()
            assert distance(model(states), expected) < 1e-5
            with subquad.hf.patch(model):
                duplicate = copy.deepcopy(model)
                restored = pickle.loads(pickle.dumps(model.layer))
            assert distance(duplicate(states), expected) < 1e-5
            assert restored.chunk_gated_delta_rule is ORIGINALS[CHUNK]
            report = handle.report()
        assert vars(model.layer) == before
        assert torch.equal(model(states), expected)
    assert [(one.name, one.operators) for one in report.recurrent] == [
        ("Bound", ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"))
    ]
    assert report.computed_recurrent == {CALLS: 2, "fused_recurrent_gated_delta_rule": 2}


def torch_causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
    """Has the name, the parameters and the habits of the function in older versions."""
    states = torch.cat([conv_state, hidden_states], dim=-1)
    conv_state.copy_(states[:, :, -conv_state.shape[-1] :])
    output = torch.nn.functional.conv1d(states, weight[:, None], bias, groups=len(weight))
    return torch.nn.functional.silu(output[:, :, -hidden_states.shape[-1] :])


class BoundConvolution(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.causal_conv1d_update = torch_causal_conv1d_update
        self.weight = torch.nn.Parameter(torch.randn(width, 4))

    def forward(self, states):
        past = torch.ones(len(states), states.shape[-1], 4)
        output = self.causal_conv1d_update(states.transpose(1, 2), past, self.weight, None, activation=None)
        return output.transpose(1, 2), past


def test_convolution_that_takes_no_notice_of_its_activation():
    torch.manual_seed(0)
    model = BoundModel(PreTrainedConfig(), BoundConvolution)
    states = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(states)
        with subquad.hf.patch(model) as handle:
            actual = model(states)
            assert handle.report().computed_recurrent == {"causal_conv1d_update": 1}
    assert distance(actual[0], expected[0]) < 1e-5
    assert torch.equal(actual[1], expected[1])


def test_report(model):
    with torch.no_grad(), subquad.hf.patch(model, row_chunks=False) as handle:
        in_parts(model, (69, 70))
        report = handle.report()
    assert str(report).splitlines()[1:] == [
        "  replaced: Qwen3NextAttention (was sdpa)",
        "  generate: growing caches",
        f"  recurrent: Qwen3NextGatedDeltaNet: {', '.join(report.recurrent[0].operators)}",
        "    computed as a whole where no gradients are needed",
        f"  computed by subquad: {2 + sum(report.computed_recurrent.values())} calls",
        "    by rms_norm_gated: 2 calls",
        *(f"    by {name}: 1 call" for name in report.computed_recurrent if name != "rms_norm_gated"),
    ]
    assert {"chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"} <= report.computed_recurrent.keys()
