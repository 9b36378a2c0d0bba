"""The cache of built directories."""

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from subquad.cli.demo import cache

FACTS = {"version": 1, "file": "a"}


def build(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "weights").write_bytes(b"w" * 1000)
    (directory / "sub" / "config.json").write_text("{}")


def never(_directory: Path) -> None:
    raise AssertionError("built again")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "new" / "cache"


def test_built_once(root):
    entry = cache.ensure(root, "model", FACTS, build)
    assert entry == cache.entry_path(root, "model", FACTS)
    assert cache.is_intact(entry)
    assert (entry / "sub" / "config.json").read_text() == "{}"
    assert cache.ensure(root, "model", FACTS, never) == entry
    assert names(root) == [entry.name]
    manifest = json.loads((entry / cache.MANIFEST).read_text())
    assert manifest["facts"] == FACTS
    assert set(manifest["files"]) == {"weights", "sub/config.json"}
    assert entry.stat().st_mode & 0o777 == 0o755


def test_digest_of_several_files_is_that_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 4)
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    whole.write_bytes(b"123456789")
    first.write_bytes(b"12345")
    second.write_bytes(b"6789")
    assert cache.digest(first, second) == cache.digest(whole) == hashlib.sha256(b"123456789").hexdigest()
    assert cache.digest(second, first) != cache.digest(whole)


def test_the_place_depends_on_every_fact(root):
    places = {
        cache.entry_path(root, "model", facts)
        for facts in (FACTS, {**FACTS, "version": 2}, {**FACTS, "file": "b"}, {**FACTS, "more": None})
    }
    assert len(places) == 4
    assert cache.entry_path(root, "model", dict(reversed(FACTS.items()))) in places


def change(entry: Path) -> None:
    (entry / "weights").write_bytes(b"w" * 999 + b"v")


def shorten(entry: Path) -> None:
    (entry / "weights").write_bytes(b"w")


def remove(entry: Path) -> None:
    (entry / "sub" / "config.json").unlink()


def add(entry: Path) -> None:
    (entry / "tokenizer.json").write_text("{}")


def cut_manifest(entry: Path) -> None:
    (entry / cache.MANIFEST).write_text('{"files": ')


def empty_manifest(entry: Path) -> None:
    (entry / cache.MANIFEST).write_text("[]")


def remove_manifest(entry: Path) -> None:
    (entry / cache.MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage", [change, shorten, remove, add, cut_manifest, empty_manifest, remove_manifest]
)
def test_a_damaged_entry_is_built_again(root, damage):
    entry = cache.ensure(root, "model", FACTS, build)
    damage(entry)
    assert not cache.is_intact(entry)
    assert cache.ensure(root, "model", FACTS, build) == entry
    assert cache.is_intact(entry)
    assert names(root) == [entry.name]


def test_a_failed_build_leaves_nothing(root):
    def fail(directory: Path) -> None:
        build(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cache.ensure(root, "model", FACTS, fail)
    assert names(root) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_concurrent_builds(root, damaged):
    if damaged:
        change(cache.ensure(root, "model", FACTS, build))
    together = threading.Barrier(4)

    def slowly(directory: Path) -> None:
        build(directory)
        together.wait(timeout=10)

    with ThreadPoolExecutor(4) as pool:
        entries = {
            job.result()
            for job in [pool.submit(cache.ensure, root, "model", FACTS, slowly) for _ in range(4)]
        }
    assert entries == {cache.entry_path(root, "model", FACTS)}
    assert cache.is_intact(entries.pop())
    assert len(names(root)) == 1


def test_a_damaged_entry_is_replaced_once(root, monkeypatch):
    entry = cache.ensure(root, "model", FACTS, build)
    change(entry)
    discard, discarded = cache._discard, []

    def slowly(path: Path) -> None:
        discard(path)
        if path == entry:
            discarded.append(path)
            time.sleep(0.1)  # for the others to overtake, if they can

    monkeypatch.setattr(cache, "_discard", slowly)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(cache.ensure, root, "model", FACTS, build) for _ in range(4)]
        assert {job.result() for job in jobs} == {entry}
    assert cache.is_intact(entry)
    assert discarded == [entry]
    assert names(root) == [entry.name]


def test_something_in_the_way(root):
    root.mkdir(parents=True)
    entry = cache.entry_path(root, "model", FACTS)
    entry.write_text("a file, not a directory")
    with pytest.raises(FileExistsError):
        cache.ensure(root, "model", FACTS, build)
    assert names(root) == [entry.name]


def test_entries_with_other_facts_are_removed(root):
    old = cache.ensure(root, "model", FACTS, build)
    other = cache.ensure(root, "tokenizer", FACTS, build)
    new = cache.ensure(root, "model", {**FACTS, "version": 2}, build)
    assert names(root) == sorted([new.name, other.name])
    assert not old.exists()


def test_abandoned_builds_are_removed_and_running_ones_kept(root):
    root.mkdir(parents=True)
    old, young = root / ".building-old", root / ".building-young"
    for each in (old, young):
        each.mkdir()
        (each / "part").write_text("x")
    ago = time.time() - 2 * cache._ABANDONED_SECONDS
    os.utime(old, (ago, ago))
    entry = cache.ensure(root, "model", FACTS, build)
    assert names(root) == sorted([young.name, entry.name])


def test_a_cache_that_may_only_be_read_is_enough(root, monkeypatch):
    entry = cache.ensure(root, "model", FACTS, build)
    monkeypatch.setattr(Path, "mkdir", never)
    assert cache.ensure(root, "model", FACTS, never) == entry
