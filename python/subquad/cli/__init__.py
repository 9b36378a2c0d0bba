"""The `subquad` command.

Every subcommand is one row of `COMMANDS` and one module that provides `add_arguments(parser)` and
`execute(options) -> int`. Nothing heavy is imported until a subcommand executes, so `subquad --help` works on
a NumPy-only install.

Exit status: 0 success; 1 the command ran and found something wrong (a failed check); 2 the user asked for
something that cannot be done; 130 interrupted; 141 nobody reads the output any more. What is wrong is told in
one line on stderr, without a traceback.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from subquad import __version__, _runtime
from subquad.cli.errors import CheckError, UserError

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# As a shell reports a program that SIGPIPE ended: whether its checks passed is not known.
EXIT_BROKEN_PIPE = 141


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


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s: one line, where argparse prints the usage as well."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line, one subparser for each row of `COMMANDS`."""
    parser = _Parser(prog="subquad", description="Attention for CPUs.")
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
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


def _check_environment() -> None:
    try:
        _runtime.config()
    except ValueError as error:  # SUBQUAD_ISA or SUBQUAD_NUM_THREADS
        raise UserError(str(error)) from error


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "execute"):
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    _check_environment()
    status: int = options.execute(options)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status, as listed in the module's documentation.

    Raises:
        SystemExit: With status 0, after `--help` and `--version`.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except CheckError as error:
        print(f"subquad: check failed: {error}", file=sys.stderr)
        return EXIT_CHECK_FAILED
    except UserError as error:
        print(f"subquad: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\nsubquad: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
