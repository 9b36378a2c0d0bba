"""What every benchmark takes and gives back."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from subquad.cli.table import Column, print_table

Value = str | float | int | None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        shapes: The file of named shapes.
        pattern: Shell pattern that selects some.
        threads: Thread count where a shape names none.
        repeat: Rounds at most.
        time_budget: Seconds for each shape and dtype.
        use_torch: Whether inputs are torch tensors and torch is a contender.
    """

    shapes: Path
    pattern: str
    threads: int
    repeat: int
    time_budget: float
    use_torch: bool


@dataclass
class Outcome:
    """The results of one benchmark.

    Attributes:
        name: The benchmark's name.
        title: A line above the table.
        columns: The columns of the table.
        rows: Their cells.
        records: The same results as numbers under stable names, one mapping for each row.
        notes: Lines below the table.
        failures: What was wrong; empty if every check passed.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[Sequence[str]] = field(default_factory=list)
    records: list[Mapping[str, Value]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, case: str, row: Sequence[str], record: Mapping[str, Value], failure: str) -> None:
        """Adds one result.

        Args:
            case: What was measured, in a line about a wrong result.
            row: Its cells.
            record: The same as numbers.
            failure: What is wrong with it; empty if nothing.
        """
        self.rows.append(row)
        self.records.append(record)
        if failure:
            self.failures.append(f"{case}: {failure}")

    def print(self, file: TextIO | None = None) -> None:
        """Prints the table, the notes, and what was wrong (to standard output by default)."""
        file = sys.stdout if file is None else file
        print(file=file)
        if self.rows:
            print_table(self.columns, self.rows, title=self.title, file=file)
        for note in self.notes:
            print(note, file=file)
        for failure in self.failures:
            print(f"WRONG RESULT  {failure}", file=file)
