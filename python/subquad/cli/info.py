"""Show what subquad found on this machine: version, instruction-set level, threads, libraries."""

import argparse
import json

from subquad.cli.dependencies import installed_version
from subquad.cli.machine import cpu_name

LIBRARIES = ("numpy", "torch", "transformers", "ml_dtypes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `subquad info`."""
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")


def execute(options: argparse.Namespace) -> int:
    """Prints the configuration; returns exit status 0."""
    import subquad
    from subquad import _runtime

    libraries = {name: installed_version(name) for name in LIBRARIES}
    if options.json:
        print(json.dumps({**_runtime.config(), "cpu": cpu_name(), "libraries": libraries}, indent=2))
        return 0
    subquad.show_config()
    print(f"cpu: {cpu_name()}")
    print("libraries:", ", ".join(f"{name} {version or '-'}" for name, version in libraries.items()))
    return 0
