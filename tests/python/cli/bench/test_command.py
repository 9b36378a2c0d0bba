"""`subquad bench` from start to end."""

import csv
import json

import numpy as np
import pytest

import subquad
from subquad.cli.bench.registry import BENCHES

pytestmark = pytest.mark.usefixtures("keep_threads")


def test_exact_in_a_process_without_torch(process):
    answer = process("bench", "exact", "--filter", "causal-256-d64/float32", "--repeat", 2, "--no-torch")
    assert answer.status == 0, answer.err
    assert "causal-256-d64  float32        1 " in answer.out
    assert answer.out.endswith("  ok\n")
    assert answer.err.splitlines()[0] == "exact ..."


def test_missing_torch_is_told(process, shapes):
    answer = process("bench", "exact", "--filter", "tiny/float32", "--repeat", 1, "--shapes", shapes)
    assert answer.status == 0, answer.err
    assert 'torch is not installed: nothing to compare with. pip install "subquad[bench]"' in answer.err


@pytest.mark.usefixtures("quick")
def test_everything(cli, shapes, tmp_path):
    pytest.importorskip("torch")
    json_path, record = tmp_path / "results.json", tmp_path / "record"
    arguments = [
        "bench",
        "--shapes",
        shapes,
        "--repeat",
        2,
        "--threads",
        1,
        "--json",
        json_path,
        "--record",
        record,
    ]
    answer = cli(*arguments)
    assert answer.status == 0, answer.out + answer.err
    for each in (
        "tiny",
        "append",
        "row",
        "pages",
        "padded",
        "modified softcap",
        "train window",
        "lengths 40",
        "one more",
        "trained",
        "small",
        "long",
        "torch's own SDPA",
        "from 1 to 2 threads; the probe: ",
    ):
        assert each in answer.out
    assert "WRONG" not in answer.out
    (path,) = record.rglob("*.csv")
    assert answer.out.endswith(f"\nrecorded in {path}\n")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["bench"] for row in rows] == ["exact"] * 4 + ["decode"] * 4 + ["masks"] * 6 + [
        "backward"
    ] * 4 + ["recurrent"] * 8 + ["latency"] * 4 + ["memory"]
    assert {row["check"] for row in rows} == {"ok"}
    document = json.loads(json_path.read_text())
    assert {name: len(each) for name, each in document["benches"].items()} == {
        "exact": 4,
        "decode": 4,
        "masks": 6,
        "backward": 4,
        "recurrent": 8,
        "latency": 4,
        "memory": 1,
    }
    assert document["failures"] == []
    first = document["benches"]["exact"][0]
    assert first["useful_flops"] == 2 * 2 * 4 * (24 * 25 // 2) * 16
    assert first["torch_ratio"] > 0
    # Causal with unequal lengths: torch has no such call.
    assert [one["torch_ratio"] is None for one in document["benches"]["exact"]] == [False, False, True, True]


@pytest.mark.usefixtures("quick")
def test_a_wrong_result_has_status_1(cli, shapes, tmp_path, monkeypatch):
    attention = subquad.attention

    def wrong(*arguments, **options):
        out = np.array(attention(*arguments, **options))
        out[0, 0, 0, 0] = np.nan
        return out

    monkeypatch.setattr(subquad, "attention", wrong)
    json_path = tmp_path / "results.json"
    arguments = [
        "--filter",
        "tiny/float32",
        "--shapes",
        shapes,
        "--repeat",
        1,
        "--no-torch",
        "--json",
        json_path,
    ]
    answer = cli("bench", "exact", *arguments)
    assert answer.status == 1
    assert "WRONG RESULT  tiny/float32, " in answer.out
    assert json.loads(json_path.read_text())["benches"]["exact"][0]["error"] is None


def test_list(cli, shapes):
    answer = cli("bench", "--list", "--shapes", shapes)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.splitlines() == [
        "exact tiny/float32",
        "exact tiny/bfloat16",
        "exact append/float32",
        "decode row/float32",
        "decode row/bfloat16",
        "decode pages/float32",
        "masks window/float32",
        "masks window/bfloat16",
        "masks padded/float32",
        "masks modified/float32",
        "backward train/float32",
        "backward train/bfloat16",
        "backward train window/float32",
        "recurrent delta/float32",
        "recurrent delta/bfloat16",
        "recurrent lengths/float32",
        "recurrent one more/float32",
        "recurrent trained/float32",
        "latency small/float32",
        "memory long/float32",
    ]


def test_list_of_some(cli, shapes):
    assert cli("bench", "--list", "--shapes", shapes, "--filter", "long").out == "memory long/float32\n"
    assert cli("bench", "--list", "--shapes", shapes, "latency").out == "latency small/float32\n"
    assert len(cli("bench", "--list").out.splitlines()) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["exactly"],
            "unknown benchmark exactly; there are exact, decode, masks, backward, recurrent, latency, memory",
        ),
        (["--filter", "nothing*"], "--filter: no shape matches 'nothing*'"),
        (["latency", "--filter", "causal*"], "--filter: no shape matches 'causal*'"),
        (["--shapes", "absent.toml"], "cannot read absent.toml: No such file or directory"),
        (["--json", "absent/results.json"], "cannot write absent/results.json: its directory does not exist"),
        (["--record", "file"], "cannot write "),
    ],
)
def test_errors_before_anything_is_measured(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("subquad.cli.bench.exact.run", None)
    answer = cli("bench", *arguments)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith(f"subquad: error: {message}")
    assert answer.err.count("\n") == 1


def test_help_names_every_benchmark(cli, capsys):
    with pytest.raises(SystemExit):
        cli("bench", "--help")
    out = " ".join(capsys.readouterr().out.split())
    for bench in BENCHES.values():
        assert f"{bench.name}: {bench.summary}" in out
