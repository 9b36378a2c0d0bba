"""`patch(model)`: switches a model's attention and recurrent layers to subquad, and back."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from threading import RLock
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from subquad.hf import registry
from subquad.hf.attention import MAX_HEAD_DIM, attention_forward
from subquad.hf.delegate import ATTRIBUTE, Binding, Original, binding_of
from subquad.hf.growing_cache import GenerateCaches, use_in_generate
from subquad.hf.interface import asks_for_sdpa, bypassing_modules, extends_masks, find_seam, interface_modules
from subquad.hf.masks import structured_mask
from subquad.hf.mla import expand_again, is_latent, read_latents
from subquad.hf.recurrent import RecurrentLayers, release_globals, use_recurrent
from subquad.hf.report import Chunked, Coverage, Latent, LeftAlone, Replaced, Report, Tally, take_report
from subquad.hf.row_chunks import RowChunks, use_row_chunks

# Implementations whose meaning of a missing mask is known, and whose masks can be built.
_KNOWN = ("eager", "sdpa", "flex_attention")
_lock = RLock()


def _has_implementation(config: object) -> bool:
    return hasattr(config, "_attn_implementation")


def _configs(model: PreTrainedModel) -> list[Any]:
    """Returns the configurations of a model and of the models in it, each once."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if id(config) in found or not _has_implementation(config):
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", {}):
            visit(getattr(config, name, None))

    visit(model.config)
    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(found.values())


def _config_of(module: torch.nn.Module) -> Any:
    return module.config


def _set_own(config: Any, implementation: str | None) -> None:
    # A dictionary without entries for sub-configurations leaves those as they are.
    config._attn_implementation = {"": implementation}


def _device(module: torch.nn.Module) -> str:
    parameter = next(module.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def _count_left_alone(reasons: Sequence[tuple[torch.nn.Module, str]]) -> tuple[LeftAlone, ...]:
    counts = Counter((type(module).__name__, reason) for module, reason in reasons)
    return tuple(LeftAlone(name, count, reason) for (name, reason), count in counts.items())


def _release(held: Sequence[Any], tally: Tally, functions: list[tuple[int, str]]) -> None:
    with _lock:
        release_globals(functions)
        for config in held:
            entry = registry.release(config, tally)
            if entry is not None:
                _set_own(entry.config, entry.original)
        registry.unregister_unused()


class Patch:
    """A patch of one model: what `patch` returns. As a context manager it undoes itself at the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        coverage: Coverage,
        tally: Tally,
        *,
        held: Sequence[Any],
        bound: Sequence[torch.nn.Module],
        caches: GenerateCaches,
        chunks: RowChunks | None,
        layers: RecurrentLayers,
    ) -> None:
        """Records what `patch` has done."""
        # Otherwise a model that only the patch refers to would be gone, and with it the patch.
        self._model: PreTrainedModel | None = model
        self._coverage = coverage
        self._tally = tally
        self._bound = tuple(bound)
        self._caches = caches
        self._chunks = chunks
        self._layers = layers
        # Also restores what other models may share, the configuration and globals of transformers, when the model is
        # dropped without `undo`.
        self._finalizer = weakref.finalize(model, _release, tuple(held), tally, layers.globals)
        self._finalizer.atexit = False

    @property
    def active(self) -> bool:
        """Whether the patch is in place."""
        return self._finalizer.alive

    def report(self) -> Report:
        """Returns what was replaced, what was left alone and why, and the calls so far."""
        return take_report(self._coverage, self._tally, active=self.active)

    def undo(self) -> None:
        """Restores the implementations the model had. A second call does nothing.

        Where several patches cover a model, it is restored when the last of them is undone, in whatever
        order.
        """
        with _lock:
            self._caches.undo()
            if self._chunks is not None:
                self._chunks.undo()
            self._layers.undo()
            self._finalizer()
            for module in self._bound:
                binding = binding_of(module)
                if binding is None:
                    continue
                left = tuple(one for one in binding.tallies if one is not self._tally)
                if left:
                    setattr(module, ATTRIBUTE, replace(binding, tallies=left))
                else:
                    delattr(module, ATTRIBUTE)
                    expand_again(module)
            self._bound = ()
            self._model = None

    def __enter__(self) -> Patch:
        """Returns the patch, which is already in place.

        Raises:
            RuntimeError: It was undone.
        """
        if not self.active:
            raise RuntimeError("this patch was undone; call subquad.hf.patch again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undoes the patch."""
        self.undo()


def _check_model(model: object) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"model: expected a transformers.PreTrainedModel, got {kind}"
            + (" (of a wrapper, pass the model inside)" if isinstance(model, torch.nn.Module) else "")
        )
    return model


def _check_implementations(model: PreTrainedModel, modules: Sequence[torch.nn.Module]) -> None:
    """Refuses models whose present implementation is not one that calls can be delegated to."""
    for config in {id(config): config for config in map(_config_of, modules)}.values():
        name = config._attn_implementation
        if registry.find(config) is not None or name is None or name in _KNOWN:
            continue
        hint = "it is a copy of a patched model; " if name == registry.NAME else ""
        raise ValueError(
            f'{type(model).__name__}: cannot patch the attention implementation "{name}", only '
            f'{", ".join(_KNOWN)}: {hint}call model.set_attn_implementation("sdpa") or ("eager") first'
        )


def _no_seam(model: PreTrainedModel, left_alone: Sequence[LeftAlone]) -> ValueError:
    listed = "".join(f"\n  left alone: {one.name} x{one.count}: {one.reason}" for one in left_alone)
    return ValueError(
        f"{type(model).__name__}: no attention of this model goes through transformers' AttentionInterface, and no "
        "layer calls a recurrent function that is known: nothing was patched. subquad.torch.override_sdpa() reaches "
        f"models that call PyTorch's scaled_dot_product_attention themselves.{listed}"
    )


def _switch(model: PreTrainedModel, tally: Tally) -> list[Any]:
    """Sets the implementation of the model and returns the configurations that now have it."""
    configs = _configs(model)
    before = [(config, config._attn_implementation) for config in configs]
    # One module of each class will do.
    examples = {type(module): module for module in model.modules()}.values()
    asks, extends = any(map(asks_for_sdpa, examples)), any(map(extends_masks, examples))
    registry.register(attention_forward, structured_mask)
    try:
        model.set_attn_implementation(registry.NAME)
    except BaseException:
        for config, name in before:
            _set_own(config, name)
        registry.unregister_unused()
        raise
    held = []
    for config, name in before:
        if config._attn_implementation == registry.NAME:
            registry.hold(registry.PatchedConfig(config, name, asks, extends, ()), tally)
            held.append(config)
    return held


def _bind(modules: Sequence[torch.nn.Module], tally: Tally) -> dict[torch.nn.Module, str]:
    """Marks modules as patched; returns those that could be, with the name of their original."""
    bound = {}
    for module in modules:
        entry, seam, known = registry.find(module.config), find_seam(module), binding_of(module)
        if entry is None or seam is None:
            continue
        if known is None:
            wants_weights = bool(getattr(module.config, "output_attentions", False))
            known = Binding(Original(entry.implementation, seam), (), wants_weights=wants_weights)
        setattr(module, ATTRIBUTE, replace(known, tallies=(*known.tallies, tally)))
        bound[module] = known.original.name
    return bound


def _read_latents(modules: Sequence[torch.nn.Module]) -> tuple[Latent, ...]:
    """Lets bound modules of multi-head latent attention read their caches as they are, where they can."""
    counts = Counter(
        (type(one).__name__, read_latents(one, MAX_HEAD_DIM)) for one in modules if is_latent(one)
    )
    return tuple(Latent(name, count, reason) for (name, reason), count in counts.items())


def _use_interface(
    model: PreTrainedModel, tally: Tally, others: Sequence[torch.nn.Module]
) -> tuple[list[Any], list[torch.nn.Module], Coverage]:
    """Switches the attention of a model.

    Args:
        model: The model.
        tally: Where calls are counted.
        others: Modules that compute with subquad's operators anyway.

    Returns:
        The configurations and the modules that are switched, and what was found.

    Raises:
        ValueError: No attention uses the interface and there is nothing else, or its implementation is not known.
    """
    seams = interface_modules(model)
    using = [module for module in seams if _has_implementation(getattr(module, "config", None))]
    left = [
        (module, "its class does not use AttentionInterface")
        for module in bypassing_modules(model)
        if not set(module.modules()).intersection(others)
    ]
    left += [(module, "it has no configuration") for module in set(seams).difference(using)]
    if not (using or others):
        raise _no_seam(model, _count_left_alone(left))
    _check_implementations(model, using)
    held = _switch(model, tally) if using else []
    bound = _bind(using, tally)
    replaced: Counter[tuple[str, str]] = Counter()
    for module in using:
        if module not in bound:
            left.append((module, "transformers does not let its model set the implementation"))
        elif (device := _device(module)) != "cpu":
            left.append((module, f"on device {device}: calls are delegated to {bound[module]}"))
        else:
            replaced[type(module).__name__, bound[module]] += 1
    left_alone = _count_left_alone(left)
    if not (bound or others):
        _release(held, tally, [])
        raise _no_seam(model, left_alone)
    coverage = Coverage(
        model=type(model).__name__,
        replaced=tuple(Replaced(name, count, original) for (name, original), count in replaced.items()),
        left_alone=left_alone,
        latent=_read_latents(list(bound)),
    )
    return held, list(bound), coverage


def patch(model: PreTrainedModel, *, row_chunks: bool = True) -> Patch:
    """Lets subquad compute the attention and the recurrent layers of a HuggingFace model.

    Works for every model that uses transformers' `AttentionInterface`, and for those whose recurrent layers call a
    function that `subquad.hf.fallbacks` lists: gated delta rules, Mamba, Mamba-2 and short convolutions. Other models
    are not affected, not even of the same class. Calls that subquad does not implement are computed by the implementation the model
    had; the report says which and how many. Those are calls with `indices`, `block_indices` or a paged cache,
    with `output_attentions`, on other devices than the CPU, and within `torch.compile`; and those of models
    whose own attention computes something else. Gradients flow through what subquad computes. Dropout takes its
    seeds from PyTorch's generator, but drops other weights than PyTorch does.

    Multi-head latent attention (DeepSeek and others) reads its cache as it is, in calls of few queries, instead
    of expanding it to keys and values for every token.

    Layers of gated delta rules and KDA are computed as a whole, from their projections to the gated norm, where no
    gradients are needed; with gradients, under autocast, with caches that record the past, and where something hooks into their
    parts, only their functions are replaced. The report says which layers, and counts those calls. Long prompts of them
    run in pieces, in which bfloat16 products may be rounded differently.

    Recurrent layers keep their caches. States of decoding are written in place, and Mamba-1 continues from a cached state with
    several tokens too, where transformers starts from zeros.

    RMSNorms and MLPs run long inputs in chunks of some thousand tokens, so that their intermediate tensors stay in
    the processor's cache and take no memory: a token's result does not depend on other tokens, apart from
    rounding in PyTorch's kernels. The report lists them.

    `generate` gets a `GrowingCache` in place of a `DynamicCache`, where the report does not say otherwise.

    A model that is already patched can be patched again: each patch has its own counts, and the model is
    restored when the last one is undone.

    Args:
        model: The model. Its parameters and modules are not replaced.
        row_chunks: Whether RMSNorms and MLPs run long inputs in chunks.

    Returns:
        The patch, with `report()` and `undo()`, and as a context manager.

    Raises:
        TypeError: `model` is no `transformers.PreTrainedModel`.
        ValueError: No attention of the model uses the interface and it has no recurrent layer that is known, or its
            present implementation is not "eager", "sdpa" or "flex_attention".
    """
    model = _check_model(model)
    with _lock:
        tally = Tally()
        layers = use_recurrent(model, tally)
        try:
            held, bound, coverage = _use_interface(model, tally, layers.modules)
        except BaseException:
            layers.undo()
            raise
        caches = use_in_generate(model)
        chunks = use_row_chunks(model) if row_chunks else None
        shadowed = [(module, "something else has shadowed its method") for module in layers.shadowed]
        coverage = replace(
            coverage,
            left_alone=coverage.left_alone + _count_left_alone(shadowed),
            cache=caches.reason,
            recurrent=layers.coverage,
            chunked=() if chunks is None else tuple(Chunked(*one) for one in chunks.counts.items()),
        )
        return Patch(
            model, coverage, tally, held=held, bound=bound, caches=caches, chunks=chunks, layers=layers
        )
