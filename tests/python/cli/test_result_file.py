"""Results as JSON."""

import json
import math

import pytest

from subquad.cli.errors import UserError
from subquad.cli.result_file import check_writable, write_json


def test_writable(tmp_path, monkeypatch):
    check_writable(tmp_path / "new.json")
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    check_writable(Path("new.json"))
    assert list(tmp_path.iterdir()) == []


def test_not_writable(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="it is a directory"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match="its directory does not exist"):
        check_writable(tmp_path / "no" / "new.json")
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write anything
    with pytest.raises(UserError, match="permission denied"):
        check_writable(tmp_path / "new.json")


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, 2)], "c": {"d": math.nan, "e": "text"}})
    assert json.loads(path.read_text()) == {
        "a": None,
        "b": [None, 1.5, [None, 2]],
        "c": {"d": None, "e": "text"},
    }
    assert path.read_text().endswith("}\n")


def test_a_failed_write_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        write_json(tmp_path, {})
