"""A key-value cache for generation that does not copy all of itself for every token."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from threading import RLock
from types import MethodType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from subquad.hf.growing_layers import (
    GrowingLayer,
    GrowingSlidingWindowLayer,
    can_grow,
    growing,
    unchanged_on_error,
)
from subquad.hf.window_store import WindowStore

_SEAM = "_prepare_cache_for_generation"
# Transformers renamed it.
_CACHE_ARGUMENTS = ("cache", "past_key_values")

_lock = RLock()
_uses: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def _has_growing_kind(cache: DynamicCache) -> bool:
    return cache.layer_class_to_replicate is DynamicLayer or any(map(can_grow, cache.layers))


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose `update` takes amortised constant time per token.

    `DynamicCache` concatenates: for every token, it copies all keys and values it holds. This cache appends
    in place, to buffers `[B, H, capacity, D]` with room to spare (`GrowingLayer`,
    `GrowingSlidingWindowLayer`), and otherwise does what `DynamicCache` does. The keys and values are views
    of the used parts, `[:, :, :length]`: the last axis is contiguous, the heads' stride is `capacity * D`.
    Keys and values of one head and of different widths are columns of one buffer instead.

    Replaced are the layers of the classes `DynamicLayer` and `DynamicSlidingWindowLayer`. All others (linear
    attention, convolution, indexed, hybrid, those of single models) stay transformers' own.

    Views handed out keep their content when tokens are appended, evicted or reordered, and at a `reset`. Only
    after `crop` they may not: the tokens appended next take the place of those removed, also in views from
    before the `crop` (`clone` those first). Memory is freed by `reset`, not by `crop`.

    Updates in grad mode, under `torch.compile` and of tensor subclasses concatenate, so that gradients are
    right; decode under `torch.no_grad` or `torch.inference_mode`, as `generate` does. Copies and pickles hold
    the used part only.

    An `update` or a `crop` that fails leaves the cache as it was, and so does any other method that refuses its
    arguments.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[torch.Tensor | None, ...]] | None = None,
        config: Any = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        """Creates an empty cache, or one with given content.

        Args:
            ddp_cache_data: Keys, values and, optionally, window of each layer, as `DynamicCache` yields them.
            config: The model's configuration, which says which layers have a window. Without it, none has.
            offloading: Must be false.
            offload_only_non_sliding: Has no meaning without `offloading`.

        Raises:
            ValueError: Offloading was asked for.
        """
        if offloading:
            raise ValueError(
                "offloading: GrowingCache stays where the model is; use transformers.DynamicCache"
            )
        super().__init__(
            ddp_cache_data, config, offloading=False, offload_only_non_sliding=offload_only_non_sliding
        )
        self._grow_layers()

    @classmethod
    def adopt(cls, cache: DynamicCache) -> GrowingCache:
        """Returns a growing cache with the content and the settings of a `DynamicCache`.

        No tensor is copied or changed, so that the other cache remains usable.

        Raises:
            TypeError: It is no `DynamicCache`, or of a subclass with a behaviour of its own.
            ValueError: It offloads.
        """
        if type(cache) is not DynamicCache:
            raise TypeError(f"cache: expected a transformers.DynamicCache, got {type(cache).__qualname__}")
        if cache.offloading:
            raise ValueError("cache: it offloads, which GrowingCache does not")
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(cache))
        adopted._grow_layers()
        return adopted

    def _grow_layers(self) -> None:
        self.layers = [growing(layer) for layer in self.layers]
        windows = [layer for layer in self.layers if isinstance(layer, GrowingSlidingWindowLayer)]
        store = WindowStore(len(windows))
        for layer in windows:
            layer.store = store
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens to a layer and returns all its keys and values."""
        count = len(self.layers)
        if layer_idx < count or torch.compiler.is_compiling():
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:
            del self.layers[count:]
            raise

    # What changes batch rows is not guarded: that would keep the old buffers of all layers until the last is done.
    @unchanged_on_error(lambda cache: cache.layers)
    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Removes the last tokens, as `DynamicCache` does."""
        super().crop(*args, **kwargs)

    def reserve(self, tokens: int) -> None:
        """Makes the next buffers large enough for so many tokens in total, so that they need not be replaced.

        Windows are bounded anyway; their layers take no notice.
        """
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.reserve(tokens)
        if self.layer_class_to_replicate is not None:
            # Declared as a class; all that is done with it is to call it.
            self.layer_class_to_replicate = partial(_reserved_layer, tokens)  # type: ignore[assignment]

    @property
    def is_compileable(self) -> bool:
        """Never: `generate` would compile the model for static layers in a cache of another class."""
        return False


def _reserved_layer(tokens: int) -> GrowingLayer:
    layer = GrowingLayer()  # type: ignore[no-untyped-call]
    layer.reserve(tokens)
    return layer


def _grown(cache: Any) -> Any:
    """Returns what `generate` is to use instead of a cache it has just created, which may be the same."""
    if type(cache) is EncoderDecoderCache:
        # Cross-attention is written once: nothing is to be gained there.
        cache.self_attention_cache = _grown(cache.self_attention_cache)
    elif type(cache) is DynamicCache and not cache.offloading and _has_growing_kind(cache):
        return GrowingCache.adopt(cache)
    return cache


# The name is the seam's: a pickled bound method is looked up by it, and finds the model's own again.
def _prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    given = [name for name in _CACHE_ARGUMENTS if model_kwargs.get(name) is not None]
    result = getattr(type(self), _SEAM)(self, generation_config, model_kwargs, *args, **kwargs)
    for name in _CACHE_ARGUMENTS:
        if name in model_kwargs and name not in given:
            model_kwargs[name] = _grown(model_kwargs[name])
    return result


def _is_in_use(model: PreTrainedModel) -> bool:
    own = vars(model).get(_SEAM)
    return isinstance(own, MethodType) and own.__func__ is _prepare_cache_for_generation


def _find_obstacle(model: PreTrainedModel) -> str | None:
    """Returns why a model's `generate` cannot be given growing caches, `None` if it can."""
    if not (callable(getattr(type(model), _SEAM, None)) and callable(getattr(model, "generate", None))):
        return "it has no generate that prepares a cache"
    if _SEAM in vars(model) and not _is_in_use(model):
        return f"something else has replaced its {_SEAM}"
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return "it has a cache of its own kind"
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers share keys and values (num_kv_shared_layers)"
    return None


class GenerateCaches:
    """That a model's `generate` creates growing caches: what `use_in_generate` returns.

    As a context manager it undoes itself at the end.

    Attributes:
        reason: Why the model was left alone, `None` if it was not.
    """

    def __init__(self, model: PreTrainedModel, reason: str | None) -> None:
        """Records what `use_in_generate` has done."""
        self.reason = reason
        self._model = model if reason is None else None

    @property
    def active(self) -> bool:
        """Whether it is in place."""
        return self._model is not None

    def undo(self) -> None:
        """Makes `generate` create the caches it used to. A second call does nothing.

        Where a model was asked for several times, this takes as many calls, in whatever order.
        """
        with _lock:
            model, self._model = self._model, None
            if model is None:
                return
            left = _uses.pop(model, 1) - 1
            if left > 0:
                _uses[model] = left
            elif _is_in_use(model):
                delattr(model, _SEAM)

    def __enter__(self) -> GenerateCaches:
        """Returns itself, which is already in place."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Undoes it."""
        self.undo()


def use_in_generate(model: PreTrainedModel) -> GenerateCaches:
    """Makes `model.generate` create a `GrowingCache` wherever it would create a `DynamicCache`.

    This sets one attribute of this one object, which shadows the method in which `generate` creates its
    cache. Caches that the caller passes, static, quantized and offloaded caches, and those of models without
    a layer that could grow stay as they are; so does the cache that `forward` creates if called without one.
    Copies of the model (`copy.deepcopy`) create growing caches too; pickles do not.

    Returns:
        What undoes it. Its `reason` says why a model was left alone: it has no `generate`, a cache of its own
        kind, or layers that share keys and values.
    """
    with _lock:
        reason = _find_obstacle(model)
        if reason is None:
            _uses[model] = _uses.get(model, 0) + 1
            if not _is_in_use(model):
                setattr(model, _SEAM, MethodType(_prepare_cache_for_generation, model))
        return GenerateCaches(model, reason)
