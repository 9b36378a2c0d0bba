"""Records as CSV and JSON."""

import csv
import re
from datetime import datetime

import pytest

import subquad
from subquad.cli.bench import record
from subquad.cli.bench.outcome import Outcome
from subquad.cli.errors import UserError


def make_outcome(**changes) -> Outcome:
    outcome = Outcome("exact", "title", ())
    outcome.records.append(
        {"shape": "a, b", "dtype": "float32", "threads": 2, "torch_ratio": None, **changes}
    )
    return outcome


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(record, "cpu_name", lambda: "AMD EPYC (family 26, model 2)")


def test_place(tmp_path):
    path = record.prepare(tmp_path / "new" / "record")
    assert path.parent == tmp_path / "new" / "record" / "amd-epyc-family-26-model-2"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d\.csv", path.name)
    assert not path.exists()


def test_append(tmp_path):
    path = record.prepare(tmp_path)
    record.append(path, [make_outcome(), make_outcome(shape="c")])
    assert record.prepare(tmp_path) == path
    record.append(path, [make_outcome(shape="d")])
    found = rows(path)
    assert [row["shape"] for row in found] == ["a, b", "c", "d"]
    assert path.read_text().count("\n") == 4  # one line of headings
    assert tuple(found[0]) == record.FIELDS
    assert found[0]["bench"] == "exact"
    assert found[0]["version"] == subquad.__version__
    assert found[0]["torch_ratio"] == ""
    assert datetime.fromisoformat(found[0]["time"]).utcoffset() is not None


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = record.prepare(tmp_path)
    path.write_text("time,shape\n")
    with pytest.raises(UserError, match="has other columns"):
        record.prepare(tmp_path)
    assert path.read_text() == "time,shape\n"


def test_an_empty_file_is_started(tmp_path):
    path = record.prepare(tmp_path)
    path.touch()
    record.append(record.prepare(tmp_path), [make_outcome()])
    assert len(rows(path)) == 1


def test_unknown_fields_are_a_defect(tmp_path):
    with pytest.raises(ValueError, match="walls"):
        record.append(record.prepare(tmp_path), [make_outcome(walls=3)])


def test_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        record.prepare(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        record.append(tmp_path, [make_outcome()])
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write anything
    with pytest.raises(UserError, match="permission denied"):
        record.prepare(tmp_path)


def test_document(monkeypatch):
    outcome = make_outcome()
    outcome.failures.append("wrong")
    document = record.as_document([outcome])
    assert document["cpu"] == "AMD EPYC (family 26, model 2)"
    assert document["benches"] == {"exact": outcome.records}
    assert document["failures"] == ["wrong"]
    assert document["version"] == subquad.__version__
