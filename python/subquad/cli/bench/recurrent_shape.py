"""The named shapes of recurrent operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from subquad.cli.bench.recurrent_operators import OPERATORS, Operator, all_sizes
from subquad.cli.bench.shapes import (
    ITEM_BYTES,
    check_case,
    check_count,
    check_flag,
    check_floor,
    check_limit,
    check_torch_floor,
)

FORMS = ("forward", "training", "step")
AGAINST = ("attention", "lengths")


@dataclass(frozen=True)
class RecurrentShape:
    """Calls of a recurrent operator, with what they are required to reach.

    Attributes:
        name: Unique in its table.
        operator: A key of `recurrent_operators.OPERATORS`.
        sizes: Of the letters of its axes; `B`, the sequences, is 1 if it is not given.
        dtypes: Element types to run it in.
        tokens: Of each sequence, one call for each number; in the file one number need be no list. 1 for steps.
        form: `"forward"`; `"training"`, forward and backward; or `"step"`, one token more, with the state in place.
        channels_last: Whether the memory of inputs `[B, D, T]` is `[B, T, D]`.
        threads: Thread counts to compare; empty for the one that the command was told.
        floor: By level and dtype, the least percent of the peak that the calls are held against.
        torch_floor: By dtype, the least ratio to transformers' fallback, which is a contender only where it is given; 0 for
            one that is shown only.
        against: What the calls are measured beside: `"attention"`, exact causal attention of the same tokens, heads and
            widths; `"lengths"`, each other, by the time of a token; training is always held against forward alone.
        limit_ratio: The most that they may take as a multiple of that; 0 for no limit.
        limit_mib_per_thread: MiB that each call may use for each thread beyond what it takes and returns; 0 for no limit,
            and memory is not measured.
    """

    name: str
    operator: str
    sizes: Mapping[str, int]
    dtypes: tuple[str, ...]
    tokens: tuple[int, ...] = (1,)
    form: str = "forward"
    channels_last: bool = False
    threads: tuple[int, ...] = ()
    floor: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    torch_floor: Mapping[str, float] = field(default_factory=dict)
    against: str = ""
    limit_ratio: float = 0.0
    limit_mib_per_thread: float = 0.0

    def __post_init__(self) -> None:
        """Checks all values.

        Raises:
            ValueError: A value is wrong, or some do not go together.
        """
        check_case(self.name, self.dtypes, self.threads)
        if self.operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {self.operator!r}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        self._check_sizes()
        self._check_tokens()
        check_flag("channels_last", self.channels_last)
        if self.channels_last and not any(each.axes == "BDT" for each in self.kind.inputs.values()):
            raise ValueError(f"channels_last needs inputs [B, D, T], which {self.operator} has not")
        if self.form == "step" and not self.kind.step:
            raise ValueError(
                f"form step needs a state that is updated in place, which {self.operator} has not"
            )
        self._check_requirements()

    def _check_sizes(self) -> None:
        letters = self.kind.letters
        if not isinstance(self.sizes, Mapping) or set(self.sizes) - {"B"} != letters:
            raise ValueError(
                f"sizes must give a number for {', '.join(sorted(letters))} (and B), got {self.sizes!r}"
            )
        for letter, size in self.sizes.items():
            check_count(f"sizes.{letter}", size)

    def _check_tokens(self) -> None:
        tokens: Any = self.tokens
        if type(tokens) is int:
            tokens = (tokens,)
        if not isinstance(tokens, tuple) or not tokens or len(set(tokens)) < len(tokens):
            shown = list(tokens) if isinstance(tokens, tuple) else tokens
            raise ValueError(
                f"tokens must be a whole number, or a list of several, none of them twice, got {shown!r}"
            )
        for count in tokens:
            check_count("tokens", count)
        if self.form == "step" and tokens != (1,):
            raise ValueError(f"tokens must be 1 in form step, got {list(tokens)!r}")
        object.__setattr__(self, "tokens", tokens)

    def _check_requirements(self) -> None:
        check_floor(self.floor, self.dtypes)
        if self.floor and not self.bound:
            raise ValueError("floor needs form forward or step")
        check_torch_floor(self.torch_floor, self.dtypes)
        if self.against and self.against not in AGAINST:
            raise ValueError(f"against must be one of {', '.join(AGAINST)}, got {self.against!r}")
        if self.against and self.form != "forward":
            raise ValueError("against needs form forward")
        if self.against == "lengths" and len(self.tokens) < 2:
            raise ValueError(f"against lengths needs several tokens, got {list(self.tokens)!r}")
        if self.against == "attention" and not {"q", "k", "v"} <= set(self.kind.inputs):
            raise ValueError(f"against attention needs inputs q, k and v, which {self.operator} has not")
        for name in ("limit_ratio", "limit_mib_per_thread"):
            check_limit(name, getattr(self, name))
        if self.limit_ratio and not self.against and self.form != "training":
            raise ValueError("limit_ratio needs against, or form training")
        if self.limit_mib_per_thread and self.form == "step":
            raise ValueError("limit_mib_per_thread needs form forward or training")

    @property
    def kind(self) -> Operator:
        """The operator."""
        return OPERATORS[self.operator]

    @property
    def bound(self) -> str:
        """What the calls are held against: `"arithmetic"`, `"copy"`, `"update"`, or nothing, which is empty."""
        if self.form == "training":
            return ""
        if self.form == "step":
            return "update"
        return "copy" if self.kind.moves_memory else "arithmetic"

    @property
    def held_against(self) -> str:
        """What the calls are measured beside, in a few words; empty for nothing."""
        if self.form == "training":
            return "forward alone"
        return {"attention": "exact attention", "lengths": "the cheapest length"}.get(self.against, "")

    def calls(self) -> tuple[RecurrentShape, ...]:
        """Returns the shape of each call, which has one number of tokens."""
        if len(self.tokens) == 1:
            return (self,)
        base: dict[str, Any] = {"against": "", "limit_ratio": 0.0} if self.against == "lengths" else {}
        return tuple(
            replace(self, name=f"{self.name} {count}", tokens=(count,), **base) for count in self.tokens
        )

    def axes(self, axes: str) -> tuple[int, ...]:
        """Returns the sizes of axes of the only call."""
        (tokens,) = self.tokens
        sizes = all_sizes(self.sizes, tokens)
        return tuple(sizes[letter] for letter in axes)

    @property
    def useful_flops(self) -> int:
        """Operations of the only call, forward."""
        return prod(self.axes("BT")) * self.kind.flops(self.sizes)

    def useful_bytes(self, dtype: str) -> int:
        """Returns the bytes that the only call must read and write: states, or what is convolved and the result, once each."""
        if self.form == "step":
            return 2 * prod(self.axes("BHKV")) * max(ITEM_BYTES[dtype], ITEM_BYTES["float32"])
        return 2 * prod(self.axes(self.kind.out)) * ITEM_BYTES[dtype]
