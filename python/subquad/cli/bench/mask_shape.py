"""The named shapes of masks: windows, modifiers of scores, and sequences of several lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from subquad.cli.bench.shapes import WindowedShape, check_limit, check_torch_floor

# NumPy is imported where it is needed: the command's help, which lists the shapes' kinds, does without.
if TYPE_CHECKING:
    import numpy as np

LAYOUTS = ("padded", "packed", "apart")
MODIFIERS = ("softcap", "alibi", "sinks")

_ALL = slice(None)
_SOFTCAP = 50.0
_SEED = 20_240_503


def alibi_slopes(heads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns the slopes of ALiBi, `[H]`: a geometric series that ends at `2 ** -8`."""
    import numpy as np

    return np.exp2(-8.0 * np.arange(1, heads + 1) / heads).astype(np.float32)


def sinks(heads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns standard normal logits without a value, `[H]`, the same in every run."""
    import numpy as np

    return np.random.default_rng(_SEED).standard_normal(heads, dtype=np.float32)


@dataclass(frozen=True)
class MaskShape(WindowedShape):
    """Calls of self-attention that are held against plain ones of as much useful work.

    What they are held against follows from what they are:

    - a window and modifiers of scores: the same call without;
    - padded or packed sequences: a call for each alone, one after another;
    - sequences apart: each other, by the time of a token.

    Attributes:
        queries: Tokens; follows from `lengths` where there are some.
        keys: The same as `queries`.
        batch: Follows from `lengths` and `layout`.
        modifiers: Modifiers of scores, each in a call of its own, and the most that it may take as a multiple of
            the plain call's time.
        lengths: Tokens of each sequence; empty for one sequence.
        layout: What is done with several sequences: `"padded"` to one batch, `"packed"` one behind another,
            `"apart"` in calls of their own; empty without `lengths`.
        limit_ratio: The most that it may take as a multiple of what it is held against; 0 for no limit.
        torch_floor: By dtype, the least ratio to torch with a mask; torch is a contender only where it is given.
    """

    queries: int = field(default=0, kw_only=True)
    keys: int = field(default=0, init=False)
    batch: int = field(default=1, init=False)
    modifiers: Mapping[str, float] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    layout: str = ""
    limit_ratio: float = 0.0
    torch_floor: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fills in what follows from the lengths, and checks all.

        Raises:
            ValueError: A value is wrong, or some do not go together.
        """
        if self.lengths or self.layout:
            self._check_lengths()
            tokens = sum(self.lengths) if self.layout == "packed" else max(self.lengths)
            object.__setattr__(self, "queries", tokens)
            object.__setattr__(self, "batch", len(self.lengths) if self.layout == "padded" else 1)
        super().__post_init__()
        self._check_modifiers()
        if self.modifiers and not self.causal:
            raise ValueError("modifiers need causal")
        if self.window and self.layout in ("padded", "packed"):
            raise ValueError("window needs one sequence, or layout apart")
        check_limit("limit_ratio", self.limit_ratio)
        check_torch_floor(self.torch_floor, self.dtypes)
        if self.torch_floor and not self._has_torch_mask():
            raise ValueError(
                "torch_floor needs layout padded without causal, or one sequence with a window and no modifiers"
            )

    def _has_torch_mask(self) -> bool:
        if self.layout:
            return self.layout == "padded" and not self.causal
        return self.window > 0 and not self.modifiers

    def _check_lengths(self) -> None:
        lengths: Any = self.lengths
        if (
            not isinstance(lengths, tuple)
            or not lengths
            or not all(type(length) is int and length >= 1 for length in lengths)
        ):
            shown = list(lengths) if isinstance(lengths, tuple) else lengths
            raise ValueError(f"lengths must be a list of whole numbers of at least 1, got {shown!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.queries:
            raise ValueError("queries follows from lengths")
        if self.layout == "apart" and len(set(lengths)) < max(len(lengths), 2):
            raise ValueError("lengths must be at least two, none of them twice, with layout apart")

    def _check_modifiers(self) -> None:
        modifiers: Any = self.modifiers
        if not isinstance(modifiers, Mapping) or set(modifiers) - set(MODIFIERS):
            raise ValueError(
                f"modifiers must give a number for some of {', '.join(MODIFIERS)}, got {modifiers!r}"
            )
        for most in modifiers.values():
            check_limit("modifiers", most)
        if modifiers and self.lengths:
            raise ValueError("modifiers need one sequence")
        if modifiers and self.limit_ratio:
            raise ValueError("limit_ratio is given by modifiers")

    @property
    def against(self) -> str:
        """What the calls are held against, in a few words."""
        if self.layout:
            return "the cheapest length" if self.layout == "apart" else "each alone"
        return "all keys" if self.window else "no modifier"

    @property
    def limit(self) -> float:
        """The most that a call of `calls` may take of the time of what it is held against; 0 for no limit."""
        return max(self.modifiers.values(), default=self.limit_ratio)

    def parts(self) -> tuple[MaskShape, ...]:
        """Returns the shape of each sequence alone; its own where there is one sequence."""
        if not self.lengths:
            return (self,)
        return tuple(
            replace(self, name=f"{self.name} {length}", queries=length, lengths=(), layout="", torch_floor={})
            for length in self.lengths
        )

    def calls(self) -> tuple[MaskShape, ...]:
        """Returns the shape of each call that is measured."""
        if self.layout == "apart":
            return self.parts()
        if not self.modifiers:
            return (self,)
        return tuple(
            replace(self, name=f"{self.name} {name}", modifiers={name: most})
            for name, most in self.modifiers.items()
        )

    def plain(self) -> tuple[MaskShape, ...]:
        """Returns the shape of each sequence alone, without window and modifiers."""
        return tuple(replace(part, window=0, modifiers={}, torch_floor={}) for part in self.parts())

    def options(self, heads: slice = _ALL) -> dict[str, Any]:
        """Returns the keyword arguments that the call has beside its inputs, for all heads or some."""
        options = super().options(heads)
        if "softcap" in self.modifiers:
            options["softcap"] = _SOFTCAP
        if "alibi" in self.modifiers:
            options["alibi_slopes"] = alibi_slopes(self.heads)[heads]
        if "sinks" in self.modifiers:
            options["sinks"] = sinks(self.heads)[heads]
        if self.layout == "padded":
            from subquad import masks

            options["mask"] = masks.padding(self.lengths, queries=True)
        return options

    @property
    def useful_flops(self) -> int:
        """Operations of the two products over the visible pairs of each sequence."""
        if self.lengths:
            return sum(part.useful_flops for part in self.parts())
        return super().useful_flops
