"""`install` and `uninstall`: counted, and undone exactly."""

from __future__ import annotations

import warnings
from importlib import import_module
from threading import RLock
from typing import Protocol

from .absent import Modules

# What flash-linear-attention says when it is imported without a GPU.
_NO_GPU = "Triton is not supported on current platform"


class _Installed(Protocol):
    def undo(self) -> None: ...


_lock = RLock()
_count = 0
_installed: _Installed | None = None


def install() -> None:
    """Makes the operators of `fla.ops` compute CPU tensors with `subquad.ops`.

    Imports flash-linear-attention where it is installed. Calls nest: what was installed several times is undone by as many calls of
    `uninstall`.

    Raises:
        ImportError: flash-linear-attention is installed, and its import fails for another reason than a missing package.
    """
    global _count, _installed  # noqa: PLW0603
    with _lock:
        if _installed is None:
            _installed = _install()
        _count += 1


def uninstall() -> None:
    """Undoes `install`: every name of `fla` and the table of modules are as they were.

    Without an `install` before it, it does nothing. Functions of ours that other code has bound in the meantime call
    flash-linear-attention's own from here on, where that is installed.
    """
    global _count, _installed  # noqa: PLW0603
    with _lock:
        _count = max(_count - 1, 0)
        if _installed is not None and _count == 0:
            _installed.undo()
            _installed = None


def _install() -> _Installed:
    if not _can_be_imported():
        return Modules()
    # Needs PyTorch, which is there if flash-linear-attention is.
    from .package import Package

    return Package()


def _can_be_imported() -> bool:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NO_GPU)
        try:
            import_module("fla.ops")
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing.partition(".")[0] == "fla" and missing not in {"fla", "fla.ops"}:
                # It is there, and broken.
                raise
            return False
    return True
