"""Calls that go back to the implementation the model had, with the mask it expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from subquad.hf import registry
from subquad.hf.interface import Seam, find_seam
from subquad.hf.report import Tally
from subquad.hf.structured_mask import StructuredMask

# An attribute of the module, as `torch.compile` cannot trace weak dictionaries.
ATTRIBUTE = "_subquad_binding"


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
                f'subquad.hf: this call needs the {kind}implementation "{self.name}", which this model lacks: '
                "undo the patch for it"
            )
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Binding:
    """What a patched module knows about its patches.

    Attributes:
        original: To what its calls are delegated.
        tallies: Counts of the patches that cover it.
    """

    original: Original
    tallies: tuple[Tally, ...]

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
    seam = find_seam(type(module))
    if entry is None or seam is None:
        raise RuntimeError(
            f'{type(module).__name__}: the configuration says "{registry.NAME}", but the model was not patched: call '
            "subquad.hf.patch(model). For a copy of a patched model, undo the patch before copying, or call "
            'model.set_attn_implementation("sdpa")'
        )
    return Binding(Original(entry.implementation, seam), entry.tallies)


def _as_float(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def _original_mask(mask: Any, original: Original, dtype: torch.dtype) -> Any:
    if not isinstance(mask, StructuredMask):
        return mask
    dense = mask.dense()
    # The mask was built for a copy of the configuration, whose implementation could not be told.
    if original.name == "eager" and isinstance(dense, torch.Tensor) and dense.dtype == torch.bool:
        return _as_float(dense, dtype)
    return dense


def _is_causal_without_mask(module: torch.nn.Module, original: Original, kwargs: dict[str, Any]) -> bool:
    if original.name != "sdpa":
        return False
    explicit = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if explicit is None else explicit)


def _apply_selection(
    module: torch.nn.Module,
    original: Original,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Any:
    """Puts a model's choice of keys (`indices`, `block_indices`) into the mask.

    Models with sparse attention do this themselves for the names "eager" and "sdpa" only; these implementations ignore
    the choice and would compute dense attention.
    """
    indices, blocks = kwargs.get("indices"), kwargs.get("block_indices")
    if indices is None and blocks is None:
        return mask
    q_length, kv_length = query.shape[2], key.shape[2]
    if mask is None and q_length > 1 and _is_causal_without_mask(module, original, kwargs):
        square = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device)
        mask = square.tril()[None, None]
    if indices is not None:
        # Without the extra column, -1 for "none" would select the last key.
        chosen = torch.zeros(query.shape[0], q_length, kv_length + 1, dtype=torch.bool, device=query.device)
        place = torch.where((indices < 0) | (indices >= kv_length), kv_length, indices).long()
        chosen = chosen.scatter(-1, place, True)[..., :kv_length].unsqueeze(1)  # noqa: FBT003 - torch's signature
        if mask is None:
            mask = chosen if original.name == "sdpa" else _as_float(chosen, query.dtype)
        elif mask.dtype == torch.bool:
            mask = mask & chosen
        else:
            mask = mask.masked_fill(~chosen, torch.finfo(query.dtype).min)
    if blocks is not None:
        build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if build is None:
            raise NotImplementedError(
                f"subquad.hf: {type(module).__name__} selects keys by block_indices in a way that is not known: "
                "undo the patch for this model"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(kv_length - q_length, kv_length, device=query.device)
        positions = (positions if positions.ndim > 1 else positions.unsqueeze(0)).expand(query.shape[0], -1)
        mask = build(blocks, mask, kv_length, query.dtype, query.device, positions)
    return mask


def delegate(
    original: Original,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls the original implementation.

    Args:
        original: The implementation.
        module: The module that calls attention.
        query: `[B, H, Sq, D]`.
        key: `[B, Hkv, Sk, D]`.
        value: `[B, Hkv, Sk, Dv]`.
        attention_mask: What subquad's mask function returned, or the model made of it.
        **kwargs: The other arguments of the call, unchanged.

    Returns:
        What the original returns: the output, `[B, Sq, H, Dv]`, and the weights, if it computes them.

    Raises:
        NotImplementedError: The original cannot compute this call either.
    """
    mask = _original_mask(attention_mask, original, query.dtype)
    mask = _apply_selection(module, original, query, key, mask, kwargs)
    function = original.function(paged=kwargs.get("cache") is not None)
    return function(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
