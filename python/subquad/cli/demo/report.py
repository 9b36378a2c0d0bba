"""The demo's output: one table, the check below it, and the same as JSON."""

import platform
import sys
from dataclasses import asdict
from typing import Any, TextIO

from subquad.cli.demo.results import BASELINE, CANDIDATE, DemoResult, DtypeResult, Figures
from subquad.cli.demo.weights import MODEL_NAME
from subquad.cli.machine import cpu_name
from subquad.cli.table import Column, print_table

COLUMNS = (
    Column("dtype", text=True),
    Column("attention", text=True),
    Column("prefill s"),
    Column("decode ms/token"),
    Column("peak memory MiB"),
    Column("prefill speed-up"),
    Column("decode speed-up"),
)
_ABSENT = "-"


def _number(value: float | None, form: str) -> str:
    return _ABSENT if value is None else format(value, form)


def _row(dtype: str, name: str, figures: Figures, speedups: tuple[str, str]) -> tuple[str, ...]:
    return (
        dtype,
        name,
        f"{figures.prefill_seconds:.2f}",
        _number(None if figures.decode_seconds is None else figures.decode_seconds * 1e3, ".1f"),
        _number(None if figures.peak_bytes is None else figures.peak_bytes / 2**20, ",.0f"),
        *speedups,
    )


def table_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Returns the rows of the table, two for each precision."""
    rows = []
    for one in result.dtypes:
        speedups = (
            f"{one.prefill_speedup:.2f}x",
            f"{one.decode_speedup:.2f}x" if one.decode_speedup else _ABSENT,
        )
        rows.append(
            _row(one.dtype, BASELINE, one.baseline, ("1.00x", "1.00x" if one.decode_speedup else _ABSENT))
        )
        rows.append(_row("", CANDIDATE, one.candidate, speedups))
    return rows


def check_lines(one: DtypeResult, new_tokens: int) -> list[str]:
    """Returns the lines of the check of one precision."""
    quality = one.quality
    same = one.equal_tokens == new_tokens
    if same:
        tokens = f"same greedy tokens: {one.equal_tokens} of {new_tokens}"
    else:
        tokens = f"greedy tokens are the same for the first {one.equal_tokens} of {new_tokens}"
    verdict = ("PASS" if same else "FAIL") if one.dtype == "float32" else "info"
    return [
        f"{verdict}  {one.dtype}: {tokens} (closest choice was {one.smallest_margin:.3g} ahead)",
        f"      largest difference of logits: {quality.logit_difference:.2g} over the prompt, "
        f"{quality.logit_difference_last:.2g} at its last position",
        f"      perplexity of the prompt: {quality.perplexity_baseline:.4f} {BASELINE}, "
        f"{quality.perplexity_candidate:.4f} {CANDIDATE}",
    ]


def print_report(result: DemoResult, file: TextIO | None = None) -> None:
    """Prints the table and the check.

    Args:
        result: The demo's results.
        file: Where to; standard output by default.
    """
    file = sys.stdout if file is None else file
    rounds = ", ".join(f"{one.dtype} {one.rounds}" for one in result.dtypes)
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    title = (
        f"{MODEL_NAME}: {result.prompt_tokens:,} tokens of prompt, {result.new_tokens} generated greedily, "
        f"{threads}, {cpu_name()}"
    )
    print(file=file)
    print_table(COLUMNS, table_rows(result), title=title, file=file)
    print(f"Medians of interleaved rounds ({rounds}); memory is the peak above the loaded model.", file=file)
    print("\nCheck", file=file)
    for one in result.dtypes:
        print(*check_lines(one, result.new_tokens), sep="\n", file=file)
    for report in dict.fromkeys(one.patch_report for one in result.dtypes if one.patch_report):
        print(f"\nPatched\n{report}", file=file)
    print(f"\n{result.seconds:.0f} s in all.", file=file)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import subquad

    return {
        "python": platform.python_version(),
        "subquad": subquad.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def as_document(result: DemoResult) -> dict[str, Any]:
    """Returns the results as a JSON document, in seconds and bytes."""
    return {
        "model": MODEL_NAME,
        "cpu": cpu_name(),
        "versions": _versions(),
        "passed": result.passed,
        **asdict(result),
    }
