"""What a patch replaced, what it left alone, and which calls went back to the original implementation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    """Modules whose attention subquad computes.

    Attributes:
        name: Class name.
        count: How many modules of this class.
        original: The implementation they had, to which calls are delegated.
    """

    name: str
    count: int
    original: str


@dataclass(frozen=True)
class LeftAlone:
    """Modules that look like attention but stay as they were.

    Attributes:
        name: Class name.
        count: How many modules of this class.
        reason: Why.
    """

    name: str
    count: int
    reason: str


@dataclass(frozen=True)
class Latent:
    """Modules of multi-head latent attention, which cache one latent for all heads.

    Attributes:
        name: Class name.
        count: How many modules of this class.
        reason: Why every call expands the cache to keys and values; `None` where calls of few queries read it
            as it is.
    """

    name: str
    count: int
    reason: str | None


@dataclass(frozen=True)
class Chunked:
    """Modules that run long inputs in chunks of tokens.

    Attributes:
        name: Class name.
        count: How many modules of this class.
    """

    name: str
    count: int


@dataclass(frozen=True)
class Recurrent:
    """Recurrent layers, whose functions subquad's operators stand in for.

    Attributes:
        name: Class name.
        count: How many modules of this class.
        operators: The operators, of `subquad.ops`.
        continues: Whether several tokens continue from a cached state, where transformers' function starts from
            zeros.
        whole: Whether calls without gradients are computed as a whole, from the projections to the gated norm.
        obstacle: Why they are not, of layers that look as if they could be.
    """

    name: str
    count: int
    operators: tuple[str, ...]
    continues: bool
    whole: bool = False
    obstacle: str | None = None


@dataclass(frozen=True)
class Coverage:
    """What a patch found in a model.

    Attributes:
        model: Class name of the model.
        replaced: Modules whose attention subquad computes.
        left_alone: Modules that stay as they were, and why.
        latent: Modules of multi-head latent attention.
        cache: Why `generate` keeps the caches it had; `None` where it gets growing ones.
        recurrent: Recurrent layers that compute with subquad's operators.
        chunked: Modules that run long inputs in chunks of tokens.
    """

    model: str
    replaced: tuple[Replaced, ...]
    left_alone: tuple[LeftAlone, ...]
    latent: tuple[Latent, ...]
    cache: str | None = None
    recurrent: tuple[Recurrent, ...] = ()
    chunked: tuple[Chunked, ...] = ()


@dataclass(frozen=True)
class Delegated:
    """Calls that the original implementation computed.

    Attributes:
        reason: What subquad does not implement, such as `"softcap"`.
        original: The implementation that computed them.
        calls: How many.
    """

    reason: str
    original: str
    calls: int


@dataclass
class Tally:
    """Counts of one patch, filled in as attention is called.

    Attributes:
        computed: Calls that subquad computed.
        on_latents: Those of them that read the cache of multi-head latent attention as it is.
        dense: Those of them that read a mask of one entry for each query and key, by the mask's origin.
        recurrent: Calls that operators computed for recurrent layers, by operator.
        in_parts: Calls of layers that are otherwise computed as a whole in which only functions were replaced, by reason.
        delegated: Calls that the original computed, by reason and implementation.
        compiled: Whether `torch.compile` traced a call. Counting in traced code would recompile it each time.
    """

    computed: int = 0
    on_latents: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    recurrent: Counter[str] = field(default_factory=Counter)
    in_parts: Counter[str] = field(default_factory=Counter)
    delegated: Counter[tuple[str, str]] = field(default_factory=Counter)
    compiled: bool = False


def _calls(number: int) -> str:
    return f"{number:,} call" if number == 1 else f"{number:,} calls"


def _times(count: int) -> str:
    return f" x{count}" if count > 1 else ""


@dataclass(frozen=True)
class Report:
    """A snapshot of what a patch did. `str()` gives it as text.

    Attributes:
        model: Class name of the model.
        active: Whether the model was patched when the snapshot was taken.
        replaced: Modules whose attention subquad computes.
        left_alone: Modules that stay as they were, and why.
        cache: Why `generate` keeps the caches it had; `None` where it gets growing ones.
        latent: Modules of multi-head latent attention.
        recurrent: Recurrent layers that compute with subquad's operators.
        chunked: Modules that run long inputs in chunks of tokens.
        computed: Calls of attention that subquad computed.
        on_latents: Those of them that read the cache of multi-head latent attention as it is.
        dense: Those of them that read a mask with one entry for each query and key, by the mask's origin.
        computed_recurrent: Calls that operators computed for recurrent layers, by operator.
        in_parts: Calls of layers that are otherwise computed as a whole in which only functions were replaced, by reason.
        delegated: Calls that the original implementation computed, by reason, most frequent first.
        compiled: Whether calls were compiled by `torch.compile`: the original computes those, and they are
            not counted.
    """

    model: str
    active: bool
    replaced: tuple[Replaced, ...]
    left_alone: tuple[LeftAlone, ...]
    cache: str | None
    latent: tuple[Latent, ...]
    recurrent: tuple[Recurrent, ...]
    chunked: tuple[Chunked, ...]
    computed: int
    on_latents: int
    dense: Mapping[str, int]
    computed_recurrent: Mapping[str, int]
    in_parts: Mapping[str, int]
    delegated: tuple[Delegated, ...]
    compiled: bool

    def __str__(self) -> str:
        """Returns the report as a few lines of text."""
        lines = [f"{self.model}: {'patched by subquad' if self.active else 'no longer patched by subquad'}"]
        lines += [f"  replaced: {one.name}{_times(one.count)} (was {one.original})" for one in self.replaced]
        lines += [f"  left alone: {one.name}{_times(one.count)}: {one.reason}" for one in self.left_alone]
        kept = "growing caches" if self.cache is None else f"caches left alone: {self.cache}"
        lines.append(f"  generate: {kept}")
        for one in self.latent:
            use = (
                "read as they are, by calls of few queries"
                if one.reason is None
                else f"expanded at every call: {one.reason}"
            )
            lines.append(f"  latent caches: {one.name}{_times(one.count)}: {use}")
        for layers in self.recurrent:
            lines.append(f"  recurrent: {layers.name}{_times(layers.count)}: {', '.join(layers.operators)}")
            if layers.whole:
                lines.append("    computed as a whole where no gradients are needed")
            if layers.obstacle is not None:
                lines.append(f"    computed function by function: {layers.obstacle}")
            if layers.continues:
                lines.append(
                    "    several tokens continue from the cached state; transformers starts from zeros"
                )
        if self.chunked:
            names = ", ".join(f"{one.name}{_times(one.count)}" for one in self.chunked)
            lines.append(f"  long inputs in chunks: {names}")
        lines.append(
            f"  computed by subquad: {_calls(self.computed + sum(self.computed_recurrent.values()))}"
        )
        if self.on_latents:
            lines.append(f"    on latent caches: {_calls(self.on_latents)}")
        lines += [f"    with a dense mask: {origin}: {_calls(calls)}" for origin, calls in self.dense.items()]
        lines += [
            f"    by {operator}: {_calls(calls)}" for operator, calls in self.computed_recurrent.items()
        ]
        lines += [
            f"    function by function: {reason}: {_calls(calls)} of layers"
            for reason, calls in self.in_parts.items()
        ]
        lines += [
            f"  {one.reason}: {_calls(one.calls)} delegated to {one.original}" for one in self.delegated
        ]
        if self.compiled:
            lines.append("  torch.compile: calls in compiled code are delegated to the original, uncounted")
        return "\n".join(lines)


def take_report(coverage: Coverage, tally: Tally, *, active: bool) -> Report:
    """Returns a snapshot; later calls do not change it."""
    return Report(
        model=coverage.model,
        active=active,
        replaced=coverage.replaced,
        left_alone=coverage.left_alone,
        cache=coverage.cache,
        latent=coverage.latent,
        recurrent=coverage.recurrent,
        chunked=coverage.chunked,
        computed=tally.computed,
        on_latents=tally.on_latents,
        dense=dict(tally.dense.most_common()),
        computed_recurrent=dict(tally.recurrent.most_common()),
        in_parts=dict(tally.in_parts.most_common()),
        delegated=tuple(
            Delegated(reason, original, calls) for (reason, original), calls in tally.delegated.most_common()
        ),
        compiled=tally.compiled,
    )
