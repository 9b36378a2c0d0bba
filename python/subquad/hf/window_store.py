"""Memory for what layers with a window keep of a prompt."""

from __future__ import annotations

from typing import Any

import torch

# One of keys and one of values, which may be alike.
_MOST_BLOCKS = 2


class WindowStore:
    """Memory for what the layers with a window keep of a prompt, from one allocation for all of them.

    Each layer makes large tensors of a prompt and keeps a small part of them. Allocated one by one, the small parts would lie
    between the large ones: what is free then has no room for those of the next layer, so that the process grows by them with
    every layer.
    """

    def __init__(self, layers: int) -> None:
        """Plans memory for so many layers; for 0, every tensor is allocated by itself."""
        self._layers = layers
        self._blocks: dict[Any, int] = {}
        self._free: dict[Any, list[torch.Tensor]] = {}

    def like(self, kept: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of this shape, dtype and device, contiguous and not filled."""
        kind = (kept.shape, kept.dtype, kept.device, torch.is_inference_mode_enabled())
        free = self._free.setdefault(kind, [])
        blocks = self._blocks.get(kind, 0)
        if not free and self._layers and blocks < _MOST_BLOCKS:
            self._blocks[kind] = blocks + 1
            free.extend(kept.new_empty((self._layers, *kept.shape)))
        return free.pop() if free else kept.new_empty(kept.shape)
