"""Tables: drawn by rich on a terminal that is wide enough, where it is installed; else plain aligned text.

rich shortens what does not fit, and half a number is worse than a broken line.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple, TextIO


class Column(NamedTuple):
    """A column: its heading, and whether it holds text (left-aligned) rather than numbers."""

    heading: str
    text: bool = False


def format_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Returns the table as aligned text.

    Args:
        columns: The columns, in order.
        rows: One string for each column.

    Returns:
        One line for the headings, one of rules, one for each row; no trailing blanks and no final newline.
    """
    headings = [column.heading for column in columns]
    widths = [max(map(len, cells)) for cells in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if column.text else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, rows)])


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str, file: TextIO) -> bool:
    """Draws the table if the terminal is wide enough for every cell, and tells whether it did."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, highlight=False, markup=False)
    unlimited = console.options.update(max_width=1 << 16)
    for break_headings in (False, True):
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
        for column in columns:
            heading = column.heading.replace(" ", "\n") if break_headings else column.heading
            table.add_column(heading, justify="left" if column.text else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        if console.measure(table, options=unlimited).maximum <= console.width:
            console.print(table)
            return True
    return False


def print_table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    file: TextIO | None = None,
) -> None:
    """Prints a table with an optional line of title above it.

    Args:
        columns: The columns, in order.
        rows: One string for each column.
        title: Printed above, if any.
        file: Where to; standard output by default.
    """
    file = sys.stdout if file is None else file
    if file.isatty() and find_spec("rich") is not None and _print_rich(columns, rows, title, file):
        return
    if title:
        print(title, file=file)
    print(format_plain(columns, rows), file=file)
