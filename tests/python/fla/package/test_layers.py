"""Layers of flash-linear-attention on the CPU, against themselves in float64 with oracles in the place of every kernel."""

from itertools import pairwise

import pytest
import torch
from fla.models.cache_utils import Cache

from .cases import CASES, WHOLE, build, error, expected, outputs

# RWKV-7's layer says that it may be wrong.
pytestmark = pytest.mark.filterwarnings("ignore:According to Bo:UserWarning")


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


@pytest.mark.parametrize("name", WHOLE)
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


@pytest.mark.parametrize("name", WHOLE)
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


@pytest.mark.parametrize("name", ["GLA", "gated DeltaNet", "KDA", "HGRN", "gated slots", "RWKV-7", "Mamba-2"])
def test_half_precision(name, request):
    case = CASES[name]
    layer, x = build(case, torch.bfloat16)
    wanted = expected(case, dtype=torch.bfloat16)
    request.getfixturevalue("installed")
    found = outputs(layer, x, case)
    assert found.dtype == torch.bfloat16
    # Every linear map of the layer rounds as well.
    assert error(found, wanted) < 0.02
