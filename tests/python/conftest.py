"""What tests of the array API share: inputs, libraries, the check against the oracle, new processes."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import subquad
from subquad import reference
from subquad.normalizers import ReLU
from subquad.testing import (
    FLOORS,
    SPACING,
    assert_close,
    gradient_floors,
    lse_floor,
    naive_attention,
    naive_attention_backward,
    naive_scaled_dot_product_attention,
)

DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# What is differentiated beside `q`, `k` and `v`.
TABLES = ("bias", "relative_bias", "alibi_slopes", "sinks")
LIBRARIES = ("numpy", "torch", "jax", "dlpack")


@pytest.fixture(scope="session")
def load_example() -> Callable[[str], Any]:
    """Loads a script of `examples/` as a module, by its name."""

    def load_example(name: str) -> Any:
        path = Path(__file__).parents[2] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up.
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load_example


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """Every dtype that attention is computed on."""
    return request.param


@pytest.fixture
def draw() -> Callable[..., np.ndarray]:
    """Draws standard normal arrays, `draw(dtype, *shape, width=1)`; the same ones in every run."""
    generator = np.random.default_rng(20180509)

    def draw(dtype: str, *shape: int, width: float = 1.0) -> np.ndarray:
        return (generator.standard_normal(shape) * width).astype(DTYPES[dtype])

    return draw


def _score_floor(dtype: str, largest_score: float, values: Any) -> float:
    accumulator = SPACING["float64" if dtype == "float64" else "float32"]
    largest_value = np.max(np.abs(values.astype(np.float64)), initial=0.0)
    return float((FLOORS[dtype] * SPACING[dtype] + accumulator * largest_score) * largest_value)


@pytest.fixture
def check_attention() -> Callable[..., None]:
    """Checks `subquad.attention` on NumPy arrays against the oracle, output and log-sum-exp."""

    def check(
        q: Any,
        k: Any,
        v: Any,
        *,
        clean: tuple[Any, ...] | None = None,
        scores: float | None = None,
        **options: Any,
    ) -> None:
        """Checks one call.

        Args:
            q: `[B, Sq, H, D]`.
            k: `[B, Sk, Hkv, D]`.
            v: `[B, Sk, Hkv, Dv]`.
            clean: `q`, `k` and `v` with numbers in the hidden places, for the naive formula, where NaN leaks.
            scores: the largest scaled score, where it is large or where few rows make what the naive formula
                loses a matter of luck. Rounding it once changes a probability by as many units.
            **options: those of `subquad.attention`.
        """
        dtype = str(q.dtype)
        given = options.get("out")
        out, lse = subquad.attention(q, k, v, return_lse=True, **options)
        assert given is None or out is given
        options.pop("out", None)
        expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
        naive, naive_lse = naive_attention(*(clean or (q, k, v)), dtype=dtype, **options)
        floor = None if scores is None else _score_floor(dtype, scores, (clean or (q, k, v))[2])
        if floor is not None and options.get("normalizer") is not None:
            # Weights that are not divided by their sum add up to more than one value.
            floor *= max(1.0, np.exp(np.max(expected_lse, initial=0.0)))
        assert_close(out, expected, naive=naive, dtype=dtype, floor=floor, name="out")
        if isinstance(options.get("normalizer"), ReLU):
            # A score just above zero is a small weight, as imprecise as the scores that cancel to it: sums of
            # weights have an absolute precision, their logarithms none.
            expected_lse, naive_lse, lse = (
                np.exp(np.asarray(x, np.float64)) for x in (expected_lse, naive_lse, lse)
            )
            floor = lse_floor(expected_lse, dtype) * max(1.0, float(np.max(expected_lse, initial=0.0)))
        else:
            floor = lse_floor(expected_lse, dtype)
        assert_close(lse, expected_lse, naive=naive_lse, dtype=dtype, floor=floor, name="lse")

    return check


@pytest.fixture
def check_backward() -> Callable[..., dict[str, np.ndarray]]:
    """Checks `subquad.attention_backward` on its own forward against the oracle; returns the gradients by name."""

    def check(
        do: np.ndarray,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        *,
        clean: tuple[np.ndarray, ...] | None = None,
        dlse: np.ndarray | None = None,
        library: str = "numpy",
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Checks the gradients of everything that has one.

        Args:
            do: `[B, Sq, H, Dv]`.
            q: `[B, Sq, H, D]`.
            k: `[B, Sk, Hkv, D]`.
            v: `[B, Sk, Hkv, Dv]`.
            clean: `do`, `q`, `k` and `v` with numbers in the hidden places, for the naive formula, where NaN leaks.
            dlse: `[B, H, Sq]`.
            library: whose arrays to call with.
            **options: those of `subquad.attention`.
        """
        dtype, inputs = str(q.dtype), (q, k, v)
        wrt = ("q", "k", "v", *(name for name in TABLES if name in options and options[name].dtype != bool))

        def converted(x: Any) -> Any:
            return _CONVERSIONS[library](x) if isinstance(x, np.ndarray) else x

        given = {name: converted(x) for name, x in options.items()}
        foreign = [converted(x) for x in inputs]
        results = subquad.attention(*foreign, return_lse=True, **given)
        gradients = subquad.attention_backward(
            converted(do), *foreign, *results, dlse=converted(dlse), wrt=wrt, **given
        )
        exact = reference.attention(*inputs, return_lse=True, **options)
        expected = reference.attention_backward(do, *inputs, *exact, dlse=dlse, wrt=wrt, **options)
        clean = clean or (do, *inputs)
        options |= {"dtype": dtype, "dlse": dlse, "wrt": wrt}
        naive = naive_attention_backward(*clean, **options)
        floors = gradient_floors(expected, *clean, *exact, **options)
        found = {}
        for name, gradient, *rest in zip(wrt, gradients, expected, naive, floors, strict=True):
            own = dtype if name in {"q", "k", "v"} else str(options[name].dtype)
            assert type(gradient) is type(foreign[0])
            assert str(gradient.dtype).removeprefix("torch.") == own
            assert_close(
                gradient, rest[0], naive=rest[1], floor=rest[2], dtype=own, gradient=True, name=f"d{name}"
            )
            found[name] = gradient
        return found

    return check


@pytest.fixture
def check_sdpa() -> Callable[..., None]:
    """Checks `subquad.scaled_dot_product_attention`, and PyTorch's formula as a witness, by the oracle."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def check(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> None:
        dtype = str(query.dtype).removeprefix("torch.")
        out = subquad.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        with sdpa_kernel(SDPBackend.MATH):
            witness = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, **options
            )
        assert (out.shape, out.dtype) == (witness.shape, witness.dtype)
        arrays = [x.double().numpy() for x in (query, key, value)]
        mask = attn_mask
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask.double()).numpy()
        expected = reference.scaled_dot_product_attention(*arrays, mask, **options)
        naive = naive_scaled_dot_product_attention(*arrays, mask, dtype=dtype, **options)
        # Few rows make what the naive formula loses a matter of luck: one rounding of the scores is allowed.
        scale = options.get("scale")
        scale = max(arrays[0].shape[-1], 1) ** -0.5 if scale is None else scale
        finite = [np.where(np.isfinite(x), x, 0.0) for x in arrays]
        norms = [np.sqrt(np.max(np.sum(x * x, axis=-1), initial=0.0)) for x in finite[:2]]
        floor = _score_floor(dtype, abs(scale) * norms[0] * norms[1], finite[2])
        assert_close(out, expected, naive=naive, dtype=dtype, floor=floor, name="subquad")
        assert_close(witness, expected, naive=naive, dtype=dtype, floor=floor, name="torch")

    return check


class DLPackOnly:
    """An array that has nothing but the protocol's two methods."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def _to_torch(array: np.ndarray) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_jax(array: np.ndarray) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(array)


def _to_dlpack(array: np.ndarray) -> DLPackOnly:
    # NumPy does not export bfloat16.
    return DLPackOnly(_to_torch(array) if array.dtype == ml_dtypes.bfloat16 else array)


_CONVERSIONS = {"numpy": lambda array: array, "torch": _to_torch, "jax": _to_jax, "dlpack": _to_dlpack}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    """Every kind of array that is accepted."""
    return request.param


@pytest.fixture
def convert() -> Callable[[str, np.ndarray], Any]:
    """Converts a NumPy array, `convert(library, array)`, sharing its memory where possible."""
    return lambda library, array: _CONVERSIONS[library](array)


@pytest.fixture
def keep_num_threads() -> Iterator[None]:
    """Undoes `set_num_threads`."""
    before = subquad.get_num_threads()
    yield
    subquad.set_num_threads(before)


@pytest.fixture(params=(1, 3))
def num_threads(request: pytest.FixtureRequest, keep_num_threads: None) -> int:
    """One thread and several, more than some machines have."""
    subquad.set_num_threads(request.param)
    return request.param


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs code in a process of its own, with warnings as errors; returns what it prints."""

    def run(code: str, *, check: bool = True, **environment: str) -> str:
        """Runs `code`.

        Args:
            code: Python; indentation that all lines share is removed.
            check: whether the process has to succeed; else errors are part of the output.
            **environment: variables besides those of this process, of which subquad's are removed.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SUBQUAD_")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
            return done.stdout
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def levels() -> list[str]:
    """The instruction sets of this machine, ascending."""
    return list(subquad._native.config()["levels"])
