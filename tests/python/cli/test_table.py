"""Tables."""

import io

import pytest

from subquad.cli.table import Column, format_plain, print_table

COLUMNS = (Column("name", text=True), Column("ms"), Column("peak memory"))
ROWS = [("a", "1.5", "12"), ("longer", "120.25", "1,024")]
PLAIN = """\
name        ms  peak memory
------  ------  -----------
a          1.5           12
longer  120.25        1,024"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain():
    assert format_plain(COLUMNS, ROWS) == PLAIN


def test_plain_without_rows():
    assert format_plain(COLUMNS, []) == "name  ms  peak memory\n----  --  -----------"


def test_no_trailing_blanks():
    assert format_plain((Column("a", text=True), Column("b", text=True)), [("x", "")]).endswith("\nx")


def test_rows_must_have_all_columns():
    with pytest.raises(ValueError, match="shorter"):
        format_plain(COLUMNS, [("a", "1.5")])


def test_print_to_a_file():
    file = io.StringIO()
    print_table(COLUMNS, ROWS, title="[Title]", file=file)
    assert file.getvalue() == f"[Title]\n{PLAIN}\n"


def test_print_without_title_to_standard_output(capsys):
    print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out == PLAIN + "\n"


@pytest.mark.parametrize(("width", "headings"), [(60, ["peak memory"]), (30, ["peak", "memory"])])
def test_terminal(monkeypatch, width, headings):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    print_table(COLUMNS, [*ROWS, ("[red]x", "3", "4")], title="[Title]", file=file)
    text = file.getvalue()
    assert "─" in text
    for each in ("[Title]", "longer", "120.25", "1,024", "[red]x", *headings):
        assert each in text
    assert ("peak memory" in text) == (headings == ["peak memory"])


def test_nothing_is_cut_off_on_a_narrow_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "20")
    file = Terminal()
    print_table(COLUMNS, ROWS, file=file)
    assert file.getvalue() == PLAIN + "\n"
