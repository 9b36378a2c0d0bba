"""Layers of flash-linear-attention on the CPU, against themselves in float64 with oracles in the place of every kernel."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from fla import layers
from fla.layers.simple_gla import SimpleGatedLinearAttention
from fla.models.cache_utils import Cache

from . import oracles

WIDTH = 64
# Not exported.
OTHERS = {"SimpleGatedLinearAttention": SimpleGatedLinearAttention}
# RWKV-7's layer says that it may be wrong.
pytestmark = pytest.mark.filterwarnings("ignore:According to Bo:UserWarning")


class Case(NamedTuple):
    """A layer, and what of it is tried."""

    name: str
    options: dict = {}  # noqa: RUF012
    call: dict = {}  # noqa: RUF012
    # Whether states go on with one token at a time only.
    one_by_one: bool = False


HEADS = {"num_heads": 2}
HEADS_OF_16 = {**HEADS, "head_dim": 16}
CASES = {
    "GLA": Case("GatedLinearAttention", HEADS),
    "GLA, convolutions, gate apart": Case(
        "GatedLinearAttention", {**HEADS, "use_short_conv": True, "fuse_norm": False}
    ),
    "simple GLA": Case("SimpleGatedLinearAttention", HEADS),
    "linear attention": Case("LinearAttention", {**HEADS, "feature_map": "elu"}),
    "linear attention, normalised": Case(
        "LinearAttention", {**HEADS, "feature_map": "relu", "do_feature_map_norm": True}
    ),
    "retention": Case("MultiScaleRetention", HEADS),
    "DeltaNet": Case("DeltaNet", HEADS),
    "DeltaNet, gated, elu": Case(
        "DeltaNet", {**HEADS, "use_gate": True, "qk_activation": "elu", "qk_norm": "sum"}
    ),
    "gated DeltaNet": Case("GatedDeltaNet", HEADS_OF_16),
    "gated DeltaNet, grouped, negative": Case(
        "GatedDeltaNet", {**HEADS_OF_16, "num_v_heads": 4, "allow_neg_eigval": True, "conv_bias": True}
    ),
    "gated DeltaProduct": Case("GatedDeltaProduct", HEADS_OF_16),
    "KDA": Case("KimiDeltaAttention", HEADS_OF_16),
    "KDA, grouped": Case("KimiDeltaAttention", {**HEADS_OF_16, "num_v_heads": 4}),
    "HGRN2": Case("HGRN2Attention", {"expand_ratio": 32}),
    "RWKV-6": Case("RWKV6Attention", HEADS),
    "RWKV-7": Case("RWKV7Attention", {"head_dim": 32, "num_hidden_layers": 4}, {"v_first": None}),
    "Mamba": Case("Mamba", {"state_size": 8}, one_by_one=True),
    "Mamba-2": Case("Mamba2", {"num_heads": 4, "head_dim": 32, "state_size": 16}, one_by_one=True),
}


def build(case, dtype=torch.float32):
    """The layer with parameters that all matter, and tokens for it."""
    torch.manual_seed(20180509)
    layer = {**vars(layers), **OTHERS}[case.name](hidden_size=WIDTH, layer_idx=0, **case.options).eval()
    for parameter in layer.parameters():
        # RWKV-7 starts with outputs of 0, norms with weights of 1.
        parameter.data += 0.1 * torch.randn(parameter.shape)
    layer = layer.to(dtype)
    return layer, torch.randn(2, 70, WIDTH).to(dtype)


def outputs(layer, x, case, **options):
    with torch.no_grad():
        found = layer(x, **case.call, **options)
    return found[0] if isinstance(found, tuple) else found


def expected(case, rows=slice(None), tokens=slice(None), dtype=torch.float32):
    with oracles.in_place():
        layer, x = build(case, dtype)
        return outputs(layer.double(), x[rows, tokens].double(), case)


def error(found, wanted):
    """The ratio of root mean squares."""
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("tokens", [70, 9])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_oracles(name, tokens, request):
    # With more than 64 tokens layers call chunk forms, with fewer recurrent ones.
    case = CASES[name]
    layer, x = build(case)
    x = x[:, :tokens]
    wanted = expected(case, tokens=slice(tokens))
    request.getfixturevalue("installed")
    found = outputs(layer, x, case)
    assert torch.equal(outputs(layer, x, case, use_cache=None), found)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_padding(name, request):
    case = CASES[name]
    layer, x = build(case)
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    mask[1, :13] = 0
    alone = expected(case, slice(1, 2), slice(13, None))
    whole = expected(case)
    request.getfixturevalue("installed")
    found = outputs(layer, x, case, attention_mask=mask)
    assert error(found[0], whole[0]) < 1e-5
    assert error(found[1, 13:], alone[0]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_states_go_on(name, request):
    case = CASES[name]
    layer, x = build(case)
    whole = expected(case)
    request.getfixturevalue("installed")
    cache, parts = Cache(), []
    bounds = (0, 66, 67, 68, 69, 70) if case.one_by_one else (0, 66, 67, 68, 70)
    for start, stop in pairwise(bounds):
        options = {"past_key_values": cache, "use_cache": True}
        parts.append(outputs(layer, x[:, start:stop], case, **options))
    assert error(torch.cat(parts, 1), whole) < 1e-5


@pytest.mark.parametrize("name", ["GLA", "gated DeltaNet", "KDA", "RWKV-7", "Mamba-2"])
def test_half_precision(name, request):
    case = CASES[name]
    layer, x = build(case, torch.bfloat16)
    wanted = expected(case, dtype=torch.bfloat16)
    request.getfixturevalue("installed")
    found = outputs(layer, x, case)
    assert found.dtype == torch.bfloat16
    # Every linear map of the layer rounds as well.
    assert error(found, wanted) < 0.02
