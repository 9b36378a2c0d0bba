"""Layers of a key-value cache that append in place instead of concatenating."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from subquad.hf.window_store import WindowStore

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Room for this many tokens is not worth saving.
_SMALLEST = 16
# A first buffer is that of a prompt: it leaves this part of it free, at most so many tokens.
_SLACK_PART = 8
_MOST_SLACK = 1024
# Updates of so many tokens are pieces of a prompt. Their attention costs far more than copying a buffer.
_PIECE = 64
# Doubling copies each token once more on average, growing 1.5 times twice more. From this size on (of the
# keys or the values of a layer), memory matters more than the copies.
_DOUBLING_BYTES = 64 * 2**20


class Snapshot:
    """What layers hold, to be restored after an error. Takes no copies of tensors."""

    def __init__(self, layers: Sequence[Any]) -> None:
        """Records what the layers refer to now."""
        self._states = [
            (layer, {name: _detach(value) for name, value in vars(layer).items()}) for layer in layers
        ]

    def restore(self) -> None:
        """Lets the layers refer to that again."""
        for layer, state in self._states:
            vars(layer).clear()
            vars(layer).update(state)


def _detach(value: Any) -> Any:
    # Only these are changed in place, besides tensors, in which nothing that is used is overwritten.
    return copy.copy(value) if isinstance(value, (_Span, dict, list)) else value


def unchanged_on_error(
    layers_of: Callable[[Any], Sequence[Any]],
) -> Callable[[Callable[Concatenate[Any, _P], _R]], Callable[Concatenate[Any, _P], _R]]:
    """Makes a method leave the layers of its object as they were if it raises."""

    def decorate(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R]:
        @wraps(method)
        def guarded(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            before = Snapshot(layers_of(self))
            try:
                return method(self, *args, **kwargs)
            except BaseException:
                before.restore()
                raise

        return guarded

    return decorate


def _is_plain(states: object) -> bool:
    """Whether copying states into a buffer is invisible to autograd, tracers and tensor subclasses."""
    return (
        type(states) is torch.Tensor
        and states.ndim == 4
        and states.layout is torch.strided
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _share_rows(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether buffers of keys and values are to be columns of one.

    This is so for one head of different widths. Multi-head latent attention caches those, and the row of a token
    is its key: attention then reads the buffer as it is. To other readers it makes no difference.
    """
    return (
        keys.shape[1] == values.shape[1] == 1
        and keys.shape[0] == values.shape[0]
        and keys.shape[3] != values.shape[3]
        and keys.dtype == values.dtype
        and keys.device == values.device
    )


def _shared_buffers(
    keys: torch.Tensor, values: torch.Tensor, batch: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns buffers for keys and values like these, `[batch, 1, capacity, D]`, that are columns of one."""
    width = keys.shape[3]
    rows = keys.new_empty((batch, 1, capacity, width + values.shape[3]))
    return rows[..., :width], rows[..., width:]


class _Span:
    """Keys, or values: the used part of a buffer `[B, H, capacity, D]`, or a tensor without a buffer.

    What lies in front of the used part was evicted; what lies behind it is free.
    """

    def __init__(self, used: torch.Tensor | None = None) -> None:
        self.used = used
        self.buffer: torch.Tensor | None = None
        self._start = 0

    def __copy__(self) -> _Span:
        duplicate = _Span(self.used)
        duplicate.buffer, duplicate._start = self.buffer, self._start
        return duplicate

    def assign(self, used: torch.Tensor | None) -> None:
        """Makes a tensor the used part. The buffer stays if the tensor is a run of its tokens."""
        if used is self.used:
            return
        start = self._find(used)
        self.used = used
        if start is None:
            self.buffer = None
        self._start = start or 0

    def _find(self, used: torch.Tensor | None) -> int | None:
        """Returns at which token of the buffer a tensor starts, `None` if it is not a run of its tokens."""
        buffer = self.buffer
        if (
            buffer is None
            or type(used) is not torch.Tensor
            or torch.compiler.is_compiling()
            or used.ndim != 4
            or used.dtype != buffer.dtype
            or used.device != buffer.device
            or used.requires_grad
            or (*used.shape[:2], used.shape[3]) != (*buffer.shape[:2], buffer.shape[3])
            or used.stride() != buffer.stride()
        ):
            return None
        address = buffer.untyped_storage().data_ptr()
        if address == 0 or used.untyped_storage().data_ptr() != address:
            return None
        return int(used.storage_offset() - buffer.storage_offset()) // int(buffer.stride(2))

    def accepts(self, states: torch.Tensor) -> bool:
        """Whether `append` gives what `torch.cat` would."""
        used = self.used
        if used is None or not _is_plain(states) or states.shape[3] == 0:
            return False
        if type(used) is not torch.Tensor or used.dtype != states.dtype or used.device != states.device:
            return False
        # `torch.cat` skips empty tensors of one axis, which is how layers start.
        return used.shape == (0,) or (
            used.ndim == 4 and (*used.shape[:2], used.shape[3]) == (*states.shape[:2], states.shape[3])
        )

    def append(self, states: torch.Tensor, *, room: int | None, reserved: int = 0) -> torch.Tensor:
        """Appends tokens and returns the used part.

        Args:
            states: `[B, H, added, D]`; `accepts` must hold.
            room: Most tokens to leave free where the buffer is replaced. `None`: no limit.
            reserved: Least capacity of a new buffer, in tokens.
        """
        length, added = self._length(), states.shape[2]
        buffer = self.buffer
        if buffer is None or self.lacks_room(added):
            capacity = self.choose_capacity(states, room=room, reserved=reserved)
            buffer = states.new_empty((*states.shape[:2], capacity, states.shape[3]))
            self.move(buffer)
        buffer.narrow(2, self._start + length, added).copy_(states)
        self.used = buffer.narrow(2, self._start, length + added)
        return self.used

    def pass_through(self, states: torch.Tensor, count: int, store: WindowStore) -> torch.Tensor:
        """Appends tokens, keeps a copy of the last `count` without a buffer and returns all there were.

        Args:
            states: `[B, H, added, D]`; `accepts` must hold.
            count: Tokens to keep, at least 1.
            store: Where memory for them comes from.
        """
        whole = torch.cat([self._stored(), states], dim=2) if self._length() else states
        kept = whole[:, :, -count:]
        self.used = store.like(kept).copy_(kept)
        self.buffer, self._start = None, 0
        return whole

    def _length(self) -> int:
        used = self._stored()
        return used.shape[2] if used.ndim == 4 else 0

    def lacks_room(self, added: int) -> bool:
        """Whether the buffer has to be replaced before so many tokens are appended."""
        buffer = self.buffer
        return (
            buffer is None
            or self._start + self._length() + added > buffer.shape[2]
            # Torch allows no in-place changes of those later.
            or (buffer.is_inference() and not torch.is_inference_mode_enabled())
        )

    def choose_capacity(self, states: torch.Tensor, *, room: int | None, reserved: int) -> int:
        """Returns of how many tokens the buffer is to be that replaces the present one, as `append` does."""
        needed = self._length() + states.shape[2]
        free = self._choose_room(states, needed)
        return max(needed + (free if room is None else min(free, room)), reserved)

    def move(self, buffer: torch.Tensor) -> None:
        """Replaces the buffer.

        Args:
            buffer: Never the old one, even where that has room in front: views of it were handed out.
        """
        if length := self._length():
            buffer[:, :, :length].copy_(self._stored())
            self.used = buffer[:, :, :length]
        self.buffer, self._start = buffer, 0

    def _choose_room(self, states: torch.Tensor, needed: int) -> int:
        """Returns how many tokens a new buffer leaves free."""
        slack = max(_SMALLEST, needed // _SLACK_PART)
        if self.buffer is None:
            return min(slack, _MOST_SLACK)
        if states.shape[2] >= _PIECE:
            return slack
        size = needed * states[:, :, :1].numel() * states.element_size()
        return max(_SMALLEST, needed if size <= _DOUBLING_BYTES else needed // 2)

    def _stored(self) -> torch.Tensor:
        if self.used is None:
            raise RuntimeError("the layer has not been initialized: nothing was stored")
        return self.used

    def keep_last(self, count: int) -> None:
        """Evicts all but the last `count` tokens."""
        used = self._stored()
        excess = used.shape[2] - count
        if excess > 0:
            self.used = used.narrow(2, excess, count)
            self._start += excess

    def reorder(self, rows: torch.Tensor, buffer: torch.Tensor) -> None:
        """Selects batch rows, into a buffer of the same capacity."""
        stored = self._stored()
        rows = rows.to(stored.device)
        used = buffer[:, :, self._start : self._start + stored.shape[2]]
        torch.index_select(stored, 0, rows, out=used)
        self.buffer, self.used = buffer, used

    def compact(self) -> torch.Tensor | None:
        """Returns the used part, as a copy of its own size if it lies in a buffer."""
        if self.used is None or self.buffer is None:
            return self.used
        return self.used.clone(memory_format=torch.contiguous_format)


class _GrowingStates:
    """Keeps the `keys` and `values` of a dynamic layer in buffers.

    Whatever transformers assigns to them becomes their content, and stays in the buffer if it is a part of it
    (as in `crop`): every method but those here is the parent's.
    """

    _keys: _Span
    _values: _Span
    is_initialized: bool
    get_seq_length: Callable[[], int]

    @property
    def keys(self) -> torch.Tensor | None:
        """The cached keys, `[B, H, length, D]`."""
        return self._keys.used

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        if "_keys" in vars(self):
            self._keys.assign(keys)
        else:
            self._keys = _Span(keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The cached values, `[B, H, length, D_v]`."""
        return self._values.used

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        if "_values" in vars(self):
            self._values.assign(values)
        else:
            self._values = _Span(values)

    @property
    def capacity(self) -> int:
        """Tokens for which the buffer of the keys has room, free and used; 0 if there is none yet."""
        buffer = self._keys.buffer
        return 0 if buffer is None else buffer.shape[2]

    def _can_append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        if not (_is_plain(key_states) and _is_plain(value_states)):
            return False
        if key_states.shape[2] != value_states.shape[2]:
            return False
        if not self.is_initialized:
            # The parent knows how, whatever the version: an update without tokens does nothing else.
            super().update(key_states[:, :, :0], value_states[:, :, :0])  # type: ignore[misc]
        return self._keys.accepts(key_states) and self._values.accepts(value_states)

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *, room: int | None, reserved: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens and returns the used parts; `_can_append` must hold."""
        added = key_states.shape[2]
        if _share_rows(key_states, value_states) and (
            self._keys.lacks_room(added) or self._values.lacks_room(added)
        ):
            capacity = max(
                self._keys.choose_capacity(key_states, room=room, reserved=reserved),
                self._values.choose_capacity(value_states, room=room, reserved=reserved),
            )
            buffers = _shared_buffers(key_states, value_states, key_states.shape[0], capacity)
            self._keys.move(buffers[0])
            self._values.move(buffers[1])
        return (
            self._keys.append(key_states, room=room, reserved=reserved),
            self._values.append(value_states, room=room, reserved=reserved),
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Selects the batch rows of the beams that go on."""
        keys, values = self._keys.buffer, self._values.buffer
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.get_seq_length() == 0
            or keys is None
            or values is None
        ):
            super().reorder_cache(beam_idx)  # type: ignore[misc]
            return
        batch = beam_idx.shape[0]
        if _share_rows(keys, values) and keys.shape[2] == values.shape[2]:
            buffers = _shared_buffers(keys, values, batch, keys.shape[2])
        else:
            buffers = (keys.new_empty((batch, *keys.shape[1:])), values.new_empty((batch, *values.shape[1:])))
        self._keys.reorder(beam_idx, buffers[0])
        self._values.reorder(beam_idx, buffers[1])

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles hold: of the buffers, only the used part."""
        state = vars(self).copy()
        state["keys"] = state.pop("_keys").compact()
        state["values"] = state.pop("_values").compact()
        state.pop("store", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class GrowingLayer(_GrowingStates, DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that appends to buffers `[B, H, capacity, D]` instead of concatenating.

    An update copies the new tokens only. The first buffer, usually that of the prompt, leaves an eighth of it
    free, at least 16 and at most 1,024 tokens. A full buffer is replaced by one for twice the tokens (above
    64 MiB, 1.5 times), so that each token is copied once more on average (twice); where 64 tokens or more are
    added, as by a prompt in pieces, by one with an eighth free. `keys` and `values` are the used parts: views
    with head stride `capacity * D`. Keys and values of one head and of different widths, such as the latents of
    multi-head latent attention, are columns of one buffer `[B, 1, capacity, D + D_v]`.

    An update that fails leaves the layer as it was. In grad mode, under `torch.compile`, and for tensor
    subclasses (fake tensors among them), an update concatenates as the parent's does.
    """

    reserved = 0

    def reserve(self, tokens: int) -> None:
        """Makes the next buffers large enough for so many tokens in total."""
        self.reserved = tokens

    @unchanged_on_error(lambda layer: (layer,))
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens.

        Args:
            key_states: `[B, H, added, D]`.
            value_states: `[B, H, added, D_v]`.
            *args: As in transformers, without meaning here.
            **kwargs: As in transformers, without meaning here.

        Returns:
            All keys and all values.
        """
        if not self._can_append(key_states, value_states):
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return updated
        return self._append(key_states, value_states, room=None, reserved=self.reserved)


class GrowingSlidingWindowLayer(_GrowingStates, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A `DynamicSlidingWindowLayer` that appends to buffers `[B, H, capacity, D]` instead of concatenating.

    The last `W - 1` tokens of the window `W` are the used part. It moves through the buffer; at its end, it
    is copied to the start of a new one with room for `W / 4` tokens more (at least 16; less in the first
    buffer, which is as `GrowingLayer`'s). A token is thus copied about four times more on average, whatever
    the window. Of updates of more tokens than that, as of a prompt, the layer copies what it keeps; the parent's
    keeps a view, and with it all keys and values of the prompt. Those that come first are returned as they are.
    While the past is recorded, the buffers grow like `GrowingLayer`'s. An update that fails leaves the layer as
    it was.
    """

    # Of a layer by itself; that of a cache is its layers' in common.
    store = WindowStore(0)

    @unchanged_on_error(lambda layer: (layer,))
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens and evicts those that left the window.

        Args:
            key_states: `[B, H, added, D]`.
            value_states: `[B, H, added, D_v]`.
            *args: As in transformers, without meaning here.
            **kwargs: As in transformers, without meaning here.

        Returns:
            The keys and the values of the window of every new token, `[B, H, <= W - 1 + added, D]`.
        """
        added = key_states.shape[-2]
        kept = self.sliding_window - 1
        records = getattr(self, "record_past", False)
        slack = max(_SMALLEST, self.sliding_window // 4)
        if kept < 1 or not self._can_append(key_states, value_states):
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, *args, **kwargs
            )
            return updated
        self.cumulative_length += added
        if added > slack and not records:
            return (
                self._keys.pass_through(key_states, kept, self.store),
                self._values.pass_through(value_states, kept, self.store),
            )
        room = None if records else slack
        keys, values = self._append(key_states, value_states, room=room)
        if records:
            return keys[:, :, -(kept + added) :], values[:, :, -(kept + added) :]
        self._keys.keep_last(kept)
        self._values.keep_last(kept)
        return keys, values


_GROWING: dict[type, Any] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingWindowLayer}


def can_grow(layer: object) -> bool:
    """Whether `growing` replaces this layer. It does not replace subclasses, such as hybrid layers."""
    return type(layer) in _GROWING


def growing(layer: Any) -> Any:
    """Returns a growing layer with the content of a dynamic one; layers of other kinds as they are."""
    kind = _GROWING.get(type(layer))
    if kind is None:
        return layer
    replacement = kind.__new__(kind)
    replacement.__setstate__(vars(layer))
    return replacement
