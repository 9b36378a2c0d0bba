"""Progress, plain and drawn."""

import io
import re

import pytest

from subquad.cli import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain():
    file = io.StringIO()
    with progress.open_progress(file) as shown:
        with shown.stage("loading"):
            pass
        with shown.stage("running", total=2) as stage:
            stage.advance("first")
            stage.advance("second")
        shown.note("done")
    lines = [re.sub(r"\d+\.\d s", "N s", line) for line in file.getvalue().splitlines()]
    assert lines == [
        "loading ...",
        "loading: N s",
        "running ...",
        "running 1/2: first",
        "running 2/2: second",
        "running: N s",
        "done",
    ]


def test_plain_stage_without_a_total():
    file = io.StringIO()
    with progress.PlainProgress(file) as shown, shown.stage("running") as stage:
        stage.advance("part")
    assert "running: part\n" in file.getvalue()


def test_plain_lines_that_only_show_are_rare(monkeypatch, clock):
    monkeypatch.setattr(progress, "time", clock)
    file = io.StringIO()
    with progress.PlainProgress(file) as shown, shown.stage("running", total=2) as stage:
        for second in range(1, 26):
            clock.sleep(1.0)
            stage.show(f"second {second}")
            if second == 12:
                stage.advance("half")
    assert file.getvalue().splitlines()[1:-1] == [
        "running: second 10",
        "running 1/2: half",
        "running: second 22",
    ]


def test_a_stage_that_fails_is_not_reported_as_done():
    file = io.StringIO()
    with pytest.raises(ZeroDivisionError), progress.PlainProgress(file) as shown, shown.stage("running"):
        raise ZeroDivisionError
    assert file.getvalue() == "running ...\n"


def test_standard_error_by_default(capsys):
    with progress.open_progress() as shown:
        shown.note("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_plain_on_a_terminal_without_rich(monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda _name: None)
    assert isinstance(progress.open_progress(Terminal()), progress.PlainProgress)


def test_drawn_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with progress.open_progress(file) as shown:
        assert isinstance(shown, progress.RichProgress)
        with shown.stage("loading"):
            pass
        with shown.stage("running", total=4) as stage:
            stage.advance("first [of] few")
            stage.show("second [of]")
        shown.note("[a note]")
    text = file.getvalue()
    for each in ("loading", "running", "second [of]", "[a note]", "✓", "\x1b[?25h"):
        assert each in text


def test_the_cursor_comes_back_after_a_failure(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with pytest.raises(KeyboardInterrupt), progress.open_progress(file) as shown, shown.stage("running"):
        raise KeyboardInterrupt
    assert file.getvalue().rstrip("\n").endswith("\x1b[?25h")
    assert "✓" not in file.getvalue()
