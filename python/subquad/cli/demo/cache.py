"""A cache of directories that are expensive to build.

An entry is a directory `<name>-<key>` with a manifest that lists the size and SHA-256 of every file. It is
built under a temporary name and renamed, so a reader sees a whole entry or none, also when two processes
build it at once. An entry that is damaged is built again.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_BUILDING = ".building-"
# Younger unfinished builds may belong to a process that is still running.
_ABANDONED_SECONDS = 3600.0
_BLOCK_BYTES = 1 << 22


def digest(*paths: Path) -> str:
    """Returns the SHA-256 of the contents of files, one after another, as hexadecimal digits."""
    state = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                state.update(block)
    return state.hexdigest()


def entry_path(root: Path, name: str, facts: dict[str, Any]) -> Path:
    """Returns where the entry for `facts` (all that it depends on) is kept, whether or not it exists."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return root / f"{name}-{key}"


def _listing(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def is_intact(entry: Path) -> bool:
    """Tells whether an entry exists and every file in it is as it was when it was built."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["files"]) and manifest["files"] == _listing(entry)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _discard(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _prune(root: Path, name: str, keep: Path) -> None:
    for path in root.glob(f"{name}-*"):
        if path != keep:
            _discard(path)
    for path in root.glob(f"{_BUILDING}*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        except OSError:
            continue
        if abandoned:
            _discard(path)


def _moved(building: Path, entry: Path) -> bool:
    try:
        building.rename(entry)
    except OSError:
        # Something is there: a damaged entry, or a good one that another process has finished.
        return is_intact(entry)
    return True


@contextmanager
def _alone_in(root: Path) -> Generator[None]:
    """Keeps other processes and threads from publishing: one might discard what another has just put there."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _publish(building: Path, entry: Path) -> None:
    with _alone_in(entry.parent):
        if not _moved(building, entry):
            _discard(entry)
            if not _moved(building, entry):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(entry))


def ensure(root: Path, name: str, facts: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Returns the entry for `facts`, building it if it is missing or damaged.

    Entries of the same name with other facts are removed after a build: they are large, and only one is ever
    read.

    Args:
        root: The cache's directory; created if necessary.
        name: What the entry holds.
        facts: Everything the content depends on; must be JSON.
        build: Fills the empty directory it is given.

    Returns:
        The entry's directory.

    Raises:
        OSError: The cache cannot be written.
    """
    entry = entry_path(root, name, facts)
    if is_intact(entry):
        return entry
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=root))
    try:
        build(building)
        manifest = {"facts": facts, "files": _listing(building)}
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.chmod(building, 0o755)  # mkdtemp makes it private; the entry is an ordinary directory.
        _publish(building, entry)
    finally:
        _discard(building)
    _prune(root, name, keep=entry)
    return entry
