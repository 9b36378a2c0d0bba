"""The `subquad` command.

Every subcommand is one row of `COMMANDS` and one module that provides `add_arguments(parser)` and
`execute(options) -> int`. Nothing heavy is imported until a subcommand executes, so `subquad --help` works on
a NumPy-only install.

Exit status: 0 success; 1 the command ran and found something wrong (a failed check); 2 the user asked for
something that cannot be done (one line on stderr, no traceback); 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from subquad.cli.errors import UserError

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """A subcommand: its name, the one line that `--help` shows, and the module that implements it."""

    name: str
    summary: str
    module: str


COMMANDS = (
    Command("info", "show version, instruction set, threads and detected libraries", "subquad.cli.info"),
    Command("demo", "run a real language model with and without subquad and compare", "subquad.cli.demo"),
    Command("bench", "measure kernels against the machine's peak and against torch", "subquad.cli.bench"),
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line, one subparser for each row of `COMMANDS`."""
    parser = argparse.ArgumentParser(prog="subquad", description="Attention for CPUs.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        module = import_module(command.module)
        subparser = commands.add_parser(
            command.name,
            help=command.summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(execute=module.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as listed in the module's documentation.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.version:
        from subquad import __version__

        print(__version__)
        return EXIT_OK
    if not hasattr(options, "execute"):
        parser.print_help()
        return EXIT_USER_ERROR
    try:
        status: int = options.execute(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"subquad: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\nsubquad: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return status
