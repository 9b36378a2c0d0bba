"""Types of arguments, and the arguments that the subcommands share."""

import argparse
from pathlib import Path

# What `subquad.set_num_threads` takes.
MAX_THREADS = 1024


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


def thread_count(text: str) -> int:
    """Parses a number of threads, 1 to 1024.

    Raises:
        argparse.ArgumentTypeError: It is not one.
    """
    value = positive_int(text)
    if value > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_THREADS} threads, got {text!r}")
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
        type=thread_count,
        metavar="N",
        help="threads of torch and of subquad alike (default: what subquad would use)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all results as JSON")
