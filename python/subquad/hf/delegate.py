"""Calls that go back to the implementation the model had, with the mask it expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from subquad.hf import registry
from subquad.hf.interface import Seam, find_seam
from subquad.hf.report import Tally
from subquad.hf.structured_mask import StructuredMask

# An attribute of the module, as `torch.compile` cannot trace weak dictionaries.
ATTRIBUTE = "_subquad_binding"


class Call(NamedTuple):
    """One call of the attention function.

    Attributes:
        module: The module that calls attention.
        query: `[B, H, Sq, D]`.
        key: `[B, Hkv, Sk, D]`.
        value: `[B, Hkv, Sk, Dv]`.
        mask: What subquad's mask function returned, or what the model made of it.
        kwargs: The other arguments, unchanged.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        """Whether SDPA aligns the call causally if there is no mask."""
        if self.query.shape[2] == 1:
            return False
        explicit = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if explicit is None else explicit)


@dataclass(frozen=True)
class Original:
    """The implementation of one module before the patch.

    Attributes:
        name: Its name.
        seam: Where the class of the module calls the interface.
    """

    name: str
    seam: Seam

    def function(self, *, paged: bool = False) -> Callable[..., Any]:
        """Returns the attention function.

        Args:
            paged: Whether it has to read the cache of transformers' continuous batching itself.

        Raises:
            NotImplementedError: There is no such function.
        """
        if paged:
            # Where there is no variant with a prefix, the model reads the cache before it calls attention.
            found = self.seam.functions.get(f"paged|{self.name}")
        else:
            found = self.seam.eager if self.name == "eager" else self.seam.functions.get(self.name)
        if found is None:
            kind = "paged " if paged else ""
            raise NotImplementedError(
                f'subquad.hf: this call needs the {kind}implementation "{self.name}", which the model lacks; '
                "undo the patch for it"
            )
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Binding:
    """What a patched module knows about its patches.

    Attributes:
        original: To what its calls are delegated.
        tallies: Counts of the patches that cover it.
        wants_weights: Whether the configuration asks for the attention weights. transformers lets that change
            only while the implementation is "eager".
        is_stray: Whether the module is in no patched model, but shares the configuration of one.
    """

    original: Original
    tallies: tuple[Tally, ...]
    wants_weights: bool = False
    is_stray: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        """Returns itself: a copy of the module calls the same functions."""
        return self


def binding_of(module: torch.nn.Module) -> Binding | None:
    """Returns the binding of a module that belongs to a patched model."""
    return getattr(module, ATTRIBUTE, None)


def stray_binding(module: torch.nn.Module) -> Binding:
    """Returns what to do with a module that was not patched but shares the configuration of one that was.

    Raises:
        RuntimeError: Its configuration is that of no patched model.
    """
    entry = registry.find(getattr(module, "config", None))
    seam = find_seam(module)
    if entry is None or seam is None:
        raise RuntimeError(
            f'{type(module).__name__}: its configuration says "{registry.NAME}", but it is not patched. '
            "Call subquad.hf.patch(model); for a copy of a patched model, undo the patch before copying, or "
            'call model.set_attn_implementation("sdpa")'
        )
    return Binding(Original(entry.implementation, seam), entry.tallies, is_stray=True)


def _as_float(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def _mask_for(original: Original, call: Call) -> Any:
    if not isinstance(call.mask, StructuredMask):
        return call.mask
    dense = call.mask.dense()
    # The mask was built for a copy of the configuration, whose implementation could not be told.
    if original.name == "eager" and isinstance(dense, torch.Tensor) and dense.dtype == torch.bool:
        return _as_float(dense, call.query.dtype)
    return dense


def _select_keys(mask: Any, indices: torch.Tensor, original: Original, call: Call) -> torch.Tensor:
    batch, _, q_length, _ = call.query.shape
    kv_length = call.key.shape[2]
    # Without the extra column, -1 for "none" would select the last key.
    place = torch.where((indices < 0) | (indices >= kv_length), kv_length, indices).long()
    chosen = torch.zeros(batch, q_length, kv_length + 1, dtype=torch.bool, device=place.device)
    chosen.scatter_(-1, place, torch.ones_like(place, dtype=torch.bool))
    chosen = chosen[:, None, :, :kv_length]
    if mask is None:
        return chosen if original.name == "sdpa" else _as_float(chosen, call.query.dtype)
    if mask.dtype == torch.bool:
        return mask & chosen  # type: ignore[no-any-return]
    return mask.masked_fill(~chosen, torch.finfo(call.query.dtype).min)  # type: ignore[no-any-return]


def _select_blocks(mask: Any, blocks: torch.Tensor, call: Call) -> Any:
    build = getattr(getattr(call.module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise NotImplementedError(
            f"subquad.hf: how {type(call.module).__name__} selects keys by block_indices is not known: undo "
            "the patch for this model"
        )
    q_length, kv_length = call.query.shape[2], call.key.shape[2]
    positions = call.kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(kv_length - q_length, kv_length, device=blocks.device)
    positions = (positions if positions.ndim > 1 else positions.unsqueeze(0)).expand(blocks.shape[0], -1)
    return build(blocks, mask, kv_length, call.query.dtype, blocks.device, positions)


def _mask_with_selection(original: Original, call: Call) -> Any:
    """Returns the mask of a call, with a model's choice of keys put in.

    Models with sparse attention put it in themselves, but only for the names "eager" and "sdpa". These
    implementations ignore `indices` and `block_indices` and would compute dense attention.
    """
    mask = _mask_for(original, call)
    indices, blocks = call.kwargs.get("indices"), call.kwargs.get("block_indices")
    if indices is None and blocks is None:
        return mask
    if mask is None and original.name == "sdpa" and call.is_causal:
        square = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool)
        mask = square.tril()[None, None].to(call.query.device)
    if indices is not None:
        mask = _select_keys(mask, indices, original, call)
    return mask if blocks is None else _select_blocks(mask, blocks, call)


def delegate(original: Original, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the original implementation.

    Args:
        original: The implementation.
        call: The call, as it came.

    Returns:
        What the original returns: the output, `[B, Sq, H, Dv]`, and the weights, if it computes them.

    Raises:
        NotImplementedError: The original cannot compute this call either.
    """
    function = original.function(paged=call.kwargs.get("cache") is not None)
    mask = _mask_with_selection(original, call)
    output: tuple[torch.Tensor, torch.Tensor | None] = function(
        call.module, call.query, call.key, call.value, mask, **call.kwargs
    )
    return output
