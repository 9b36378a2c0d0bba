"""The mask function: masks made of a few simple rules stay a description, everything else is a tensor.

transformers hands what this function returns through the model to attention. Where its own mask function
would build a tensor of one entry for each query and key, this one returns a `StructuredMask`, which attention
reads directly. Code that treats it as a tensor gets the tensor, built then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from subquad.hf import registry
from subquad.hf.mask_functions import describe
from subquad.hf.patterns import Pattern, Span
from subquad.hf.structured_mask import DenseForm, StructuredMask
from subquad.hf.tracing import is_tracing


@dataclass(frozen=True)
class _Request:
    """The arguments of a mask function that matter here, in integers."""

    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    span: Span
    padding: torch.Tensor | None
    pattern: Pattern

    @property
    def visible(self) -> int:
        """How many keys there are up to the last that some query sees, padding aside."""
        end = self.q_offset + self.q_length
        return end - self.kv_offset if self.pattern.end_by(end, self.span) else self.kv_length


def _query_range(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Returns length and offset of the queries; `None` if they are not consecutive."""
    # Before `q_length` and `q_offset`, transformers passed the positions.
    positions = arguments.get("cache_position")
    if positions is not None and "q_length" not in arguments:
        length = positions.shape[0]
        first, last = (int(positions[0]), int(positions[-1])) if length else (0, -1)
        return (length, first) if last - first == length - 1 else None
    offset = arguments.get("q_offset", 0)
    if isinstance(offset, torch.Tensor):
        # Static caches pass the tensor in which they count: it will have changed when attention reads it.
        if offset.numel() != 1:
            return None
        offset = int(offset)
    return arguments["q_length"], offset


def _padding_of_keys(arguments: dict[str, Any], kv_offset: int) -> torch.Tensor | None:
    """Returns the padding mask of the keys, `[B, Sk]`; keys that the given mask lacks are hidden."""
    given, length = arguments.get("attention_mask"), arguments["kv_length"]
    if given is None:
        return None
    # Rows beyond the batch are not looked at, as in transformers.
    given = given[: arguments["batch_size"], kv_offset : kv_offset + length].to(torch.bool)
    missing = length - given.shape[1]
    return torch.nn.functional.pad(given, (0, missing)) if missing > 0 else given


def _recognise(arguments: dict[str, Any]) -> _Request | None:
    """Returns the structure of the requested mask, or `None` if it has to be a tensor."""
    given = arguments.get("attention_mask")
    queries = _query_range(arguments)
    if queries is None or (given is not None and given.ndim != 2):
        return None
    (q_length, q_offset), kv_length = queries, arguments["kv_length"]
    kv_offset = arguments.get("kv_offset", 0)
    if not all(isinstance(one, int) for one in (q_length, kv_length, kv_offset)):
        return None
    span = Span(q_offset, q_offset + q_length - 1, kv_offset, kv_offset + kv_length - 1)
    pattern = describe(arguments.get("mask_function", causal_mask_function), span)
    if pattern is None:
        return None
    # A model that forbids to skip the mask is going to use it as a tensor; for groups, transformers forbids it itself.
    allowed = "allow_is_causal_skip" if pattern.causal else "allow_is_bidirectional_skip"
    if not (pattern.groups or pattern.either or arguments.get(allowed, pattern.causal)):
        return None
    padding = _padding_of_keys(arguments, kv_offset)
    request = _Request(q_length, kv_length, q_offset, kv_offset, span, padding, pattern)
    if padding is not None and bool(padding[:, : max(request.visible, 0)].all()):
        return replace(request, padding=None)
    return request


def _is_of_tokens_themselves(pattern: Pattern, maker: FrameType | None) -> bool:
    """Whether queries and keys are the same tokens: in causal masks they are, in others unless the keys are an encoder's."""
    if pattern.is_autoregressive:
        return True
    # transformers does not tell mask functions, but the function that calls them knows.
    names = (
        {} if maker is None or not maker.f_code.co_name.startswith("create_bidirectional") else maker.f_locals
    )
    return "encoder_hidden_states" in names and names["encoder_hidden_states"] is None


def _is_left_out(request: _Request, local_size: int | None, entry: registry.PatchedConfig | None) -> bool:
    """Whether the original would return no mask at all, and leave it to attention what that means."""
    if (
        request.padding is not None
        or not request.pattern.is_plain
        or (local_size is not None and request.kv_length >= local_size)
    ):
        return False
    implementation = None if entry is None else entry.implementation
    if not request.pattern.causal:
        return implementation in ("eager", "sdpa")
    # Only SDPA leaves causal masks out. Models know it by that name: those that ask for the name expect a
    # mask from any other implementation.
    if entry is None or implementation != "sdpa" or entry.asks_for_sdpa:
        return False
    square = request.q_length in (1, request.kv_length) and request.visible == request.kv_length
    first = request.q_offset == 0 and request.kv_offset == 0
    return square or first


def _on_cpu(device: Any) -> bool:
    return torch.device(device).type == "cpu"


def structured_mask(**arguments: Any) -> Any:
    """The mask function of subquad in transformers' `AttentionMaskInterface`.

    Args:
        **arguments: Those of `transformers.masking_utils.sdpa_mask`.

    Returns:
        A `StructuredMask` for causal masks, windows, chunks, documents, blocks of images and padding; `None` where the
        original implementation's mask function returns `None` for them; for everything else what that function
        returns.
    """
    given = arguments.get("attention_mask")
    if isinstance(given, StructuredMask):
        # `generate` builds masks in advance and passes them on as if they were padding masks.
        return given
    entry = registry.find_like(arguments.get("config"))
    implementation = "sdpa" if entry is None else entry.implementation
    original: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    needs_tensor = entry is not None and entry.extends_masks
    if needs_tensor or is_tracing(given) or not _on_cpu(arguments.get("device", "cpu")):
        return original(**arguments)
    request = _recognise(arguments)
    if request is None:
        return original(**arguments)
    if _is_left_out(request, arguments.get("local_size"), entry):
        return None
    forced: dict[str, Any] = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    if "q_offset" in arguments:
        forced["q_offset"] = request.q_offset
    build = partial(original, **{**arguments, **forced})
    return StructuredMask(
        pattern=request.pattern,
        batch_size=arguments["batch_size"],
        q_length=request.q_length,
        kv_length=request.kv_length,
        offset=request.q_offset - request.kv_offset,
        first_key=request.kv_offset,
        padding=request.padding,
        same_tokens=_is_of_tokens_themselves(request.pattern, sys._getframe(1)),
        dense_form=DenseForm(build),
    )
