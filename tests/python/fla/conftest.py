"""What tests of `subquad.fla` share: where flash-linear-attention is, and processes that find it, or a package like it."""

import os
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

# They need flash-linear-attention; `test_package.py` runs them in a process that finds it.
collect_ignore = [] if find_spec("fla") else ["package"]

# A package with the structure of flash-linear-attention, whose functions say who they are.
FILES = {
    "__init__.py": "",
    "backends.py": """
        from functools import wraps

        class BackendRegistry:
            def __init__(self):
                self._backends = {}

            def register(self, backend):
                self._backends[backend.backend_type] = backend

            def dispatch(self, function):
                @wraps(function)
                def wrapper(*args, **kwargs):
                    for backend in sorted(self._backends.values(), key=lambda backend: backend.priority):
                        if backend.is_available() and backend.is_enabled():
                            accepted, reason = backend.verify(function.__name__, *args, **kwargs)
                            implementation = backend.get_implementation(function.__name__)
                            if accepted and implementation is not None:
                                return implementation(*args, **kwargs)
                            reasons.append(reason)
                    return function(*args, **kwargs)
                return wrapper

        reasons = []
        kda = BackendRegistry()
    """,
    "ops/__init__.py": """
        from .gla import chunk_gla
        from .kda import chunk_kda, other_kda
        from .simple_gla import chunk_other
    """,
    "ops/gla/__init__.py": """
        from .chunk import chunk_gla
    """,
    "ops/gla/chunk.py": """
        def chunk_gla(q, k, v, g, scale=None, **kwargs):
            return "fla"
    """,
    "ops/kda/__init__.py": """
        from fla.backends import kda

        @kda.dispatch
        def chunk_kda(q, k, v, g, beta, **kwargs):
            return "fla"

        @kda.dispatch
        def other_kda(q):
            return "fla"
    """,
    "ops/simple_gla.py": """
        def chunk_other(q):
            return "fla"
    """,
    "modules/__init__.py": "",
    "modules/activations.py": """
        def swish(x):
            return "fla"

        ACT2FN = {"silu": swish, "swish": swish, "mine": len}
    """,
    "layers.py": """
        from fla.modules.activations import ACT2FN
        from fla.ops import chunk_gla, chunk_kda

        class Layer:
            def __init__(self):
                self.gate = ACT2FN["silu"]

            def forward(self, *args, **kwargs):
                return chunk_gla(*args, **kwargs)
    """,
    "late.py": """
        from fla.ops.gla import chunk_gla
    """,
}


@pytest.fixture
def packages() -> Path:
    """The folder with flash-linear-attention.

    It is not in the environment itself: transformers would take its functions, which need a GPU, for models on the CPU.
    """
    folder = Path(os.environ.get("FLA_PACKAGES", Path(sys.prefix, "fla")))
    assert (folder / "fla").is_dir(), f"{folder}: expected flash-linear-attention, see `make install-fla`"
    return folder


@pytest.fixture
def run_with(run_python: Callable[..., str]) -> Callable[..., str]:
    """Runs code in a process that finds the packages of a folder before all others."""

    def run(folder: Path, code: str, **options: str) -> str:
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return run_python(code, PYTHONPATH=path, **options)

    return run


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with a package that is built like flash-linear-attention."""
    for name, code in FILES.items():
        path = tmp_path / "fla" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code), encoding="utf-8")
    return tmp_path
