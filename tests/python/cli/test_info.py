"""`subquad info`."""

import json

import pytest

import subquad
from subquad import _native


def test_text(cli):
    answer = cli("info")
    assert answer.status == 0
    assert answer.err == ""
    facts = dict(line.split(": ", 1) for line in answer.out.splitlines())
    assert facts["version"] == subquad.__version__
    assert facts["level"] == _native.config()["level"]
    assert facts["num threads"] == str(subquad.get_num_threads())
    assert "numpy " in facts["libraries"]
    assert facts["cpu"]


def test_json(cli):
    answer = cli("info", "--json")
    assert answer.status == 0
    facts = json.loads(answer.out)
    assert {**_native.config()}.items() <= facts.items()
    assert facts["libraries"]["numpy"] == __import__("numpy").__version__


def test_a_missing_library(cli, monkeypatch):
    monkeypatch.setattr("subquad.cli.info.LIBRARIES", ("no-such-package",))
    assert cli("info").out.endswith("libraries: no-such-package -\n")
    assert json.loads(cli("info", "--json").out)["libraries"] == {"no-such-package": None}


@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_level_follows_the_environment(process, level):
    if level not in _native.config()["levels"]:
        pytest.skip(f"no {level} here")
    answer = process("info", "--json", SUBQUAD_ISA=level, SUBQUAD_NUM_THREADS="3")
    assert answer.status == 0, answer.err
    facts = json.loads(answer.out)
    assert (facts["level"], facts["num_threads"]) == (level, 3)
