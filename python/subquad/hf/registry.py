"""Which configurations are switched to subquad, and subquad's entries in transformers' tables.

transformers chooses the implementation by a name in the configuration, for a whole process. What belongs to
one model is therefore looked up by the identity of its configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from subquad.hf.report import Tally

# transformers gives names that contain "flash", "sdpa" or "flex_attention" a meaning, and loads those with
# "/" from its hub.
NAME = "subquad"


@dataclass(frozen=True)
class PatchedConfig:
    """A configuration whose implementation is subquad.

    Attributes:
        config: The configuration.
        original: The name it had; `None` if it never had one.
        asks_for_sdpa: Whether code of the model compares the name with "sdpa".
        extends_masks: Whether code of the model has a use for masks only if they are tensors.
        tallies: Counts of the patches that hold it, one for each; it is restored when none is left.
    """

    config: Any
    original: str | None
    asks_for_sdpa: bool
    extends_masks: bool
    tallies: tuple[Tally, ...]

    @property
    def implementation(self) -> str:
        """The original's name; transformers computes what never had a name as "eager" does."""
        return "eager" if self.original is None else self.original


# Replaced as a whole, never changed in place: attention reads it without a lock.
_patched: tuple[PatchedConfig, ...] = ()


def find(config: object) -> PatchedConfig | None:
    """Returns the entry of a configuration, compared by identity, as configurations are not hashable."""
    for entry in _patched:
        if entry.config is config:
            return entry
    return None


def find_like(config: object) -> PatchedConfig | None:
    """Returns the entry of a configuration, or else that of one of its class: some models pass copies on."""
    if (exact := find(config)) is not None:
        return exact
    for entry in _patched:
        if type(entry.config) is type(config):
            return entry
    return None


def hold(entry: PatchedConfig, tally: Tally) -> None:
    """Adds a patch to a configuration's holders, and the configuration to the table if it is new there."""
    global _patched  # noqa: PLW0603 - the table of this process, as transformers' tables are
    known = find(entry.config) or entry
    held = replace(known, tallies=(*known.tallies, tally))
    _patched = (*(one for one in _patched if one.config is not entry.config), held)


def release(config: object, tally: Tally) -> PatchedConfig | None:
    """Removes a patch from a configuration's holders.

    Returns:
        The entry, if that was the last holder: it is then no longer in the table.
    """
    global _patched  # noqa: PLW0603
    entry = find(config)
    if entry is None:
        return None
    left = tuple(one for one in entry.tallies if one is not tally)
    rest = tuple(one for one in _patched if one.config is not config)
    if not left:
        _patched = rest
        return entry
    _patched = (*rest, replace(entry, tallies=left))
    return None


def register(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Enters subquad in transformers' tables; both together, as attention without masks loses the padding.

    Raises:
        ValueError: The name is taken.
    """
    current = AttentionInterface._global_mapping.get(NAME, attention)
    if current is not attention:
        raise ValueError(f'the attention implementation "{NAME}" is already registered, as {current!r}')
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def unregister_unused() -> None:
    """Removes subquad from transformers' tables if no configuration uses it."""
    if not _patched:
        # There is no `unregister`, and `del` on an instance only reaches its local entries.
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
