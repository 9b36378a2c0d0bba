"""Show what subquad found on this machine: version, instruction-set level, threads, libraries."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `subquad info`."""
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")


def execute(options: argparse.Namespace) -> int:
    """Prints the configuration; returns exit status 0."""
    if options.json:
        from subquad import _runtime

        print(json.dumps(_runtime.config(), indent=2, default=str))
    else:
        import subquad

        subquad.show_config()
    return 0
