"""Layers of flash-linear-attention that are tried, and how their outputs are compared."""

from typing import NamedTuple

import torch
from fla import layers
from fla.layers.simple_gla import SimpleGatedLinearAttention

from . import oracles

WIDTH = 64
# Not exported.
OTHERS = {"SimpleGatedLinearAttention": SimpleGatedLinearAttention}


class Case(NamedTuple):
    """A layer, and what of it is tried."""

    name: str
    options: dict = {}  # noqa: RUF012
    call: dict = {}  # noqa: RUF012
    # Whether states go on with one token at a time only.
    one_by_one: bool = False
    # Whether states say all there is to say, and padding counts for nothing.
    has_whole_state: bool = True


HEADS = {"num_heads": 2}
HEADS_OF_16 = {**HEADS, "head_dim": 16}
# Without the noise that it has in training.
RAVEN = {**HEADS, "topk": 8, "add_gumbel_noise": False}
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
    "YOCO's gated retention": Case("YOCOGatedRetention", HEADS),
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
    "HGRN": Case("HGRNAttention"),
    "HGRN, convolutions": Case("HGRNAttention", {"use_short_conv": True, "conv_bias": True}),
    "HGRN2": Case("HGRN2Attention", {"expand_ratio": 32}),
    "Rodimus": Case("RodimusAttention"),
    "gated slots": Case("GatedSlotAttention", HEADS),
    "gated slots, convolutions, grouped": Case(
        "GatedSlotAttention",
        {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "feature_map": "relu"},
    ),
    "ABC": Case("ABCAttention", HEADS, has_whole_state=False),
    "ABC, convolutions, input gates": Case(
        "ABCAttention",
        {**HEADS, "num_slots": 24, "use_short_conv": True, "use_input_gate": True, "use_norm": False},
        has_whole_state=False,
    ),
    "LightNet": Case("LightNetAttention", {**HEADS, "expand_ratio": 32}),
    "LightNet, convolutions": Case("LightNetAttention", {"expand_ratio": 16, "use_short_conv": True}),
    "Raven": Case("Raven", RAVEN),
    "Raven, gates of slots": Case(
        "Raven", {**RAVEN, "decay_type": "GLA", "use_output_gate": True, "use_rope": True}
    ),
    "RWKV-6": Case("RWKV6Attention", HEADS),
    "RWKV-7": Case("RWKV7Attention", {"head_dim": 32, "num_hidden_layers": 4}, {"v_first": None}),
    "Mamba": Case("Mamba", {"state_size": 8}, one_by_one=True),
    "Mamba-2": Case("Mamba2", {"num_heads": 4, "head_dim": 32, "state_size": 16}, one_by_one=True),
}

# Those that go on from a state as if there had been no break.
WHOLE = [name for name, case in CASES.items() if case.has_whole_state]


def build(case, dtype=torch.float32):
    """The layer with parameters that all matter, and tokens for it."""
    torch.manual_seed(20180509)
    layer = {**vars(layers), **OTHERS}[case.name](hidden_size=WIDTH, layer_idx=0, **case.options).eval()
    for parameter in layer.parameters():
        # RWKV-7 starts with outputs of 0, norms with weights of 1.
        parameter.data += 0.1 * torch.randn(parameter.shape)
    layer = layer.to(dtype)
    return layer, torch.randn(2, 70, WIDTH).to(dtype)


def called(layer, x, case, **options):
    """The outputs of a layer, without what else it returns."""
    found = layer(x, **case.call, **options)
    return found[0] if isinstance(found, tuple) else found


def outputs(layer, x, case, **options):
    """The outputs of a layer that is not trained."""
    with torch.no_grad():
        return called(layer, x, case, **options)


def expected(case, rows=slice(None), tokens=slice(None), dtype=torch.float32):
    """The outputs in float64 with oracles, for parameters and tokens of some dtype."""
    with oracles.in_place():
        layer, x = build(case, dtype)
        return outputs(layer.double(), x[rows, tokens].double(), case)


def error(found, wanted):
    """The ratio of root mean squares."""
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
