"""Every feature of attention, as small calls with what has a gradient in each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from subquad import masks, normalizers
from subquad.torch.attention_operators import ATTENTION

B, SQ, SK, H, HKV, D, DV = 2, 5, 7, 4, 2, 4, 3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_options() -> dict[str, Any]:
    """Returns the options of a call without any, as `subquad.ops` hands them on."""
    options = dict.fromkeys((*ATTENTION.optional, *ATTENTION.others))
    return options | {"causal": False, "dropout_p": 0.0}


@pytest.fixture(name="plain_options")
def _plain_options() -> dict[str, Any]:
    return plain_options()


@dataclass(frozen=True)
class Feature:
    """One call.

    Attributes:
        options: of `subquad.attention`, without a gradient.
        learned: those with a gradient, made anew for each test.
        shapes: of q, k and v.
    """

    options: dict[str, Any] = field(default_factory=dict)
    learned: Callable[[], dict[str, torch.Tensor]] = dict
    shapes: tuple[tuple[int, ...], ...] = ((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, DV))

    def lowered(self) -> dict[str, Any]:
        """Returns all options as `subquad.ops` hands them on."""
        given = plain_options() | self.options | self.learned()
        return {
            name: value._lowered() if name in ("mask", "normalizer") and value is not None else value
            for name, value in given.items()
        }

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        return [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(self.shapes)]


def _bias(*shape: int) -> Feature:
    return Feature(learned=lambda: {"bias": draw(*shape, seed=3)})


FEATURES = {
    "plain": Feature(),
    "one head for all": Feature(shapes=((1, 3, 4, 4), (1, 6, 1, 4), (1, 6, 1, 5))),
    "more queries than keys": Feature({"causal": True}, shapes=((1, 6, 2, 4), (1, 4, 2, 4), (1, 4, 2, 4))),
    "causal": Feature({"causal": True}),
    "window": Feature({"window_size": (2, 1)}),
    "window by head": Feature({"window_size": [(2, 0), (None, 1), (0, 0), (1, None)]}),
    "window table": Feature({"window_size": torch.tensor([[2, 0], [-1, 1], [0, 0], [1, -1]])}),
    "scale": Feature({"scale": 0.3}),
    "scale by query": Feature({"scale": draw(SQ, seed=9).abs()}),
    "length scale": Feature({"causal": True, "length_scale": draw(SK + 1, seed=9).abs()}),
    "softcap": Feature({"softcap": 1.5, "causal": True}),
    "bias": _bias(B, H, SQ, SK),
    "bias of heads": _bias(H, 1, 1),
    "bias of a sequence": _bias(B, 1, SQ, SK),
    "bias of keys": _bias(SK),
    "bias of queries": _bias(SQ, 1),
    "bias of heads and keys": _bias(1, H, 1, SK),
    "boolean bias": Feature({"bias": torch.ones(SQ, SK, dtype=torch.bool).tril(1)}),
    "relative bias": Feature(learned=lambda: {"relative_bias": draw(H, SQ + SK - 1, seed=4)}),
    "relative bias for all": Feature(learned=lambda: {"relative_bias": draw(1, SQ + SK - 1, seed=4)}),
    "alibi": Feature({"causal": True}, lambda: {"alibi_slopes": draw(H, seed=5).abs()}),
    "alibi by sequence": Feature(learned=lambda: {"alibi_slopes": draw(B, H, seed=5).abs()}),
    "sinks": Feature({"window_size": (2, 0)}, lambda: {"sinks": draw(H, seed=6)}),
    "sinks by query": Feature(learned=lambda: {"sinks": draw(B, H, SQ, seed=6)}),
    "documents": Feature({"mask": masks.document([0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1, 2]) & masks.causal()}),
    "padding": Feature({"mask": masks.padding([7, 4], leftpad=[1, 0])}),
    "chunks or prefix": Feature({"mask": masks.chunked(3) | masks.prefix([2, 0])}),
    "softplus": Feature({"normalizer": normalizers.Softplus()}),
    "sigmoid": Feature({"normalizer": normalizers.Sigmoid(bias=-1.5)}),
    "dropout": Feature({"dropout_p": 0.4, "dropout_seed": 2**63 + 5, "causal": True}),
    "everything": Feature(
        {"causal": True, "window_size": (4, 0), "softcap": 2.0, "mask": masks.padding([7, 6])},
        lambda: {
            "bias": draw(H, SQ, SK, seed=3),
            "relative_bias": draw(H, SQ + SK - 1, seed=4),
            "alibi_slopes": draw(H, seed=5).abs(),
            "sinks": draw(H, seed=6),
        },
    ),
}


@pytest.fixture(params=FEATURES.values(), ids=FEATURES)
def feature(request: pytest.FixtureRequest) -> Feature:
    """Every feature."""
    return request.param
