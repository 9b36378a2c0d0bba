"""Argument types and output of results that the subcommands share."""

import argparse
import json
from pathlib import Path
from typing import Any

from subquad.cli.errors import UserError


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1, commas and underscores allowed (`4,096`).

    Raises:
        argparse.ArgumentTypeError: It is not one.
    """
    try:
        value = int(text.replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """Parses a finite number above 0.

    Raises:
        argparse.ArgumentTypeError: It is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def add_threads_and_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--threads` and `--json`, which mean the same for every command that measures."""
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="threads of torch and of subquad alike (default: what subquad would use)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all results as JSON")


def check_writable(path: Path | None) -> None:
    """Finds out that a result file cannot be written before minutes are spent on computing it.

    Raises:
        UserError: `path` is given and its directory does not exist, or it is a directory.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: its directory does not exist")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
