"""Calls of subquad's attention function as a layer of a model makes them, and the reasons for what was delegated."""

from __future__ import annotations

import torch
from transformers.modeling_utils import AttentionInterface

from subquad.hf.interface import find_seam


def reasons(handle):
    return {(one.reason, one.original): one.calls for one in handle.report().delegated}


def call(model, mask=None, *, heads=(4, 2), length=5, **kwargs):
    """Calls subquad's attention function as the first layer of a model would."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, count, length, 8, generator=generator) for count in (heads[0], heads[1], heads[1])
    )
    layer = model.model.layers[0].self_attn
    name = layer.config._attn_implementation
    function = find_seam(layer).eager if name == "eager" else AttentionInterface._global_mapping[name]
    return function(layer, query, key, value, mask, **{"scaling": 0.3, **kwargs})
