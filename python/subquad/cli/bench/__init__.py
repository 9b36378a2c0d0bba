"""Measure subquad on this machine, against the machine's own peak and against torch.

Without a name every benchmark is run. Ratios are taken within one process, the contenders taking turns, and
are medians; work hidden by masks is not counted; every result is checked, and a wrong one ends with exit
status 1.

Environment: SUBQUAD_ISA lowers the instruction-set level (scalar, avx2, avx512, avx512bf16, amx).
"""

import argparse
from importlib import import_module
from pathlib import Path

from subquad.cli.arguments import add_threads_and_json, positive_float, positive_int
from subquad.cli.bench.outcome import Outcome, Settings
from subquad.cli.bench.registry import BENCHES
from subquad.cli.bench.shape_file import DEFAULT_PATH
from subquad.cli.dependencies import missing_modules
from subquad.cli.errors import UserError
from subquad.cli.progress import open_progress
from subquad.cli.result_file import check_writable, write_json

DEFAULT_RECORD = Path("benches/record")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `subquad bench`."""
    names = "; ".join(f"{bench.name}: {bench.summary}" for bench in BENCHES.values())
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument(
        "--filter", default="*", metavar="GLOB", help="only shapes whose NAME or NAME/DTYPE matches"
    )
    parser.add_argument(
        "--shapes",
        type=Path,
        default=DEFAULT_PATH,
        metavar="PATH",
        help="another file of named shapes, or a directory with one for each benchmark",
    )
    parser.add_argument("--list", action="store_true", help="list the shapes that would be run, and run none")
    parser.add_argument(
        "--repeat", type=positive_int, default=15, metavar="N", help="rounds at most (default: 15)"
    )
    parser.add_argument(
        "--time-budget",
        type=positive_float,
        default=4.0,
        metavar="SECONDS",
        help="for each shape and dtype: no further round after so long, once there are three (default: 4)",
    )
    parser.add_argument(
        "--no-torch", action="store_true", help="use NumPy arrays and do not compare with torch"
    )
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=DEFAULT_RECORD,
        metavar="DIR",
        help=f"append the results to DIR/<cpu>/<date>.csv (default DIR: {DEFAULT_RECORD})",
    )
    add_threads_and_json(parser)


def _settings(options: argparse.Namespace) -> Settings:
    import subquad

    return Settings(
        shapes=options.shapes,
        pattern=options.filter,
        threads=options.threads or subquad.get_num_threads(),
        repeat=options.repeat,
        time_budget=options.time_budget,
        use_torch=not options.no_torch and not missing_modules(["torch"]),
    )


def execute(options: argparse.Namespace) -> int:
    """Runs the benchmarks.

    Returns:
        0, or 1 if a result was wrong.

    Raises:
        UserError: A name is unknown, nothing matches the filter, or a file cannot be read or written.
    """
    if unknown := set(options.names) - set(BENCHES):
        raise UserError(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    settings = _settings(options)
    modules = {name: import_module(BENCHES[name].module) for name in options.names or BENCHES}
    cases = {name: module.plan(settings) for name, module in modules.items()}
    if not any(cases.values()):
        raise UserError(f"--filter: no shape matches {options.filter!r}")
    if options.list:
        for name, planned in cases.items():
            for shape, dtype in planned:
                print(f"{name} {shape.name}/{dtype}")
        return 0

    from subquad.cli.bench import record

    if options.json is not None:
        check_writable(options.json)
    csv_path = None if options.record is None else record.prepare(options.record)
    outcomes: list[Outcome] = []
    with open_progress() as progress:
        if not settings.use_torch and not options.no_torch:
            progress.note('torch is not installed: nothing to compare with. pip install "subquad[bench]"')
        for name, planned in cases.items():
            if planned:
                outcomes.append(modules[name].run(planned, settings, progress))
    for outcome in outcomes:
        outcome.print()
    if csv_path is not None:
        record.append(csv_path, outcomes)
        print(f"\nrecorded in {csv_path}")
    if options.json is not None:
        write_json(options.json, record.as_document(outcomes))
    return 1 if any(outcome.failures for outcome in outcomes) else 0
