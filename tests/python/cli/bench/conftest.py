"""Tiny shapes, settings that measure them shortly, and what stands in for measurements."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import subquad
from subquad.cli.bench import contenders
from subquad.cli.bench.outcome import Settings

TINY = """
[[exact]]
name = "tiny"
batch = 2
heads = 4
kv_heads = 2
queries = 24
head_dim = 8
causal = true
dtypes = ["float32", "bfloat16"]

[[exact]]
name = "append"
queries = 3
keys = 20
head_dim = 8
causal = true
threads = [1, 2]
dtypes = ["float32"]

[[decode]]
name = "row"
heads = 4
kv_heads = 2
head_dim = 8
lengths = 20
dtypes = ["float32", "bfloat16"]

[[decode]]
name = "pages"
batch = 2
heads = 4
kv_heads = 2
head_dim = 8
queries = 3
causal = true
lengths = [19, 6]
page_size = 4
layout = "bshd"
threads = [1, 2]
dtypes = ["float32"]
against = "row"
limit_ratio = 1e6

[[masks]]
name = "window"
heads = 4
kv_heads = 2
queries = 24
head_dim = 8
causal = true
window = 5
dtypes = ["float32", "bfloat16"]
limit_ratio = 1e6
torch_floor = { float32 = 1e-6 }

[[masks]]
name = "padded"
heads = 2
lengths = [3, 11]
layout = "padded"
head_dim = 8
threads = [1, 2]
dtypes = ["float32"]
torch_floor = { float32 = 1e-6 }

[[masks]]
name = "modified"
queries = 24
head_dim = 8
causal = true
modifiers = { softcap = 1e6, sinks = 1e6 }
dtypes = ["float32"]

[[backward]]
name = "train"
batch = 2
heads = 4
kv_heads = 2
queries = 24
head_dim = 8
causal = true
dtypes = ["float32", "bfloat16"]
torch_floor = { float32 = 1e-6 }

[[backward]]
name = "train window"
queries = 24
head_dim = 8
causal = true
window = 5
threads = [1, 2]
dtypes = ["float32"]
limit_ratio = 1e6
limit_mib_per_thread = 100

[[recurrent]]
name = "delta"
operator = "gated_delta_rule"
sizes = { B = 2, H = 2, K = 8, V = 6 }
tokens = 70
dtypes = ["float32", "bfloat16"]
torch_floor = { float32 = 1e-6 }

[[recurrent]]
name = "lengths"
operator = "retention"
sizes = { H = 2, K = 8, V = 6 }
tokens = [40, 20]
threads = [1, 2]
dtypes = ["float32"]
against = "lengths"
limit_ratio = 1e6
limit_mib_per_thread = 100

[[recurrent]]
name = "one more"
operator = "kda"
sizes = { H = 2, K = 8, V = 6 }
form = "step"
dtypes = ["float32"]

[[recurrent]]
name = "trained"
operator = "gated_delta_rule"
sizes = { H = 2, K = 8, V = 6 }
tokens = 40
form = "training"
dtypes = ["float32"]
torch_floor = { float32 = 0 }
limit_ratio = 1e6

[[latency]]
name = "small"
queries = 4
head_dim = 8
dtypes = ["float32"]
limit_us = 1e6

[[memory]]
name = "long"
queries = 600
head_dim = 8
causal = true
dtypes = ["float32"]
limit_mib_per_thread = 100
"""


@pytest.fixture
def shapes(tmp_path) -> Path:
    """A file of tiny shapes."""
    path = tmp_path / "shapes.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def make_settings(shapes) -> Callable[..., Settings]:
    """Makes settings for the tiny shapes: one thread, two rounds, without torch."""

    def make(**changes: object) -> Settings:
        fields = {
            "shapes": shapes,
            "pattern": "*",
            "threads": 1,
            "repeat": 2,
            "time_budget": 1.0,
            "use_torch": False,
        }
        return Settings(**{**fields, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def quick(monkeypatch) -> None:
    """Shortens what each sample waits and lasts."""
    monkeypatch.setattr("subquad.cli.bench.timing._SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("subquad.cli.bench.timing._SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr("subquad.cli.bench.timing._WARM_SECONDS", 0.0)
    monkeypatch.setattr("subquad.cli.bench.contenders._PROBE_SECONDS", 1e-4)


@pytest.fixture
def replay(monkeypatch) -> Callable[..., dict[str, Any]]:
    """Replaces the samples of a benchmark's contenders by given ones, which a test may change.

    Those of one round have their first alone. How many rounds each was asked for is noted as `rounds`.
    """

    def arrange(module: ModuleType, samples: dict[str, Any], *, level: str | None = None) -> dict[str, Any]:
        def interleave(field, **_):
            samples["rounds"] = {each.name: each.rounds for each in field}
            return {each.name: samples[each.name][: each.rounds] for each in field}

        monkeypatch.setattr(module, "interleave", interleave)
        monkeypatch.setattr(contenders, "peak_kind", lambda _dtype: "f32")
        if level is not None:
            monkeypatch.setattr(subquad._native, "config", lambda: {"level": level})
        return samples

    return arrange


@pytest.fixture
def child(monkeypatch) -> Callable[..., list[dict[str, object]]]:
    """Replaces the process that measures memory; returns what it is asked for."""

    def arrange(
        size: int | None = None, failure: str = "", *, status: int = 0, err: str = ""
    ) -> list[dict[str, object]]:
        requests = []
        method = "unavailable" if size is None else "sampled"
        answer = json.dumps({"bytes": size, "method": method, "failure": failure})

        def run(_command, *, input, **_options):
            requests.append(json.loads(input))
            return subprocess.CompletedProcess([], status, "" if status else answer, err)

        monkeypatch.setattr(subprocess, "run", run)
        return requests

    return arrange


@pytest.fixture
def spoil(monkeypatch) -> Callable[..., None]:
    """Lets a function return NaN at one place with two threads: in its result, or in one of several by index."""

    def arrange(
        module: ModuleType, name: str, place: tuple[int, ...] = (0, 0, 0, 0), *, of: int | None = None
    ) -> None:
        function = getattr(module, name)

        def wrong(*arguments, **options):
            found = function(*arguments, **options)
            results = [found] if of is None else list(found)
            spoiled = np.array(results[of or 0])
            if subquad.get_num_threads() == 2:
                spoiled[place] = np.nan
            results[of or 0] = spoiled
            return spoiled if of is None else tuple(results)

        monkeypatch.setattr(module, name, wrong)

    return arrange


@pytest.fixture
def without_bfloat16(monkeypatch) -> None:
    """NumPy has no bfloat16."""
    monkeypatch.setattr("subquad.cli.bench.tensors.find_spec", lambda _name: None)
