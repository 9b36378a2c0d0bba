"""The demo's output: one table, the check below it, and the same as JSON."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from subquad.cli.demo.results import BASELINE, CANDIDATE, Comparison, DemoResult, Figures
from subquad.cli.machine import cpu_name
from subquad.cli.table import Column, print_table

COLUMNS = (
    Column("dtype", text=True),
    Column("attention", text=True),
    Column("prefill s"),
    Column("prefill tokens/s"),
    Column("decode ms/token"),
    Column("peak memory MiB"),
    Column("prefill speed-up"),
    Column("decode speed-up"),
)
_ABSENT = "-"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _ABSENT if value is None else format(value, form) + unit


def _row(dtype: str, name: str, figures: Figures, tokens: int, speedups: tuple[str, str]) -> tuple[str, ...]:
    return (
        dtype,
        name,
        f"{figures.prefill_seconds:.2f}",
        f"{tokens / figures.prefill_seconds:,.0f}",
        _number(None if figures.decode_seconds is None else figures.decode_seconds * 1e3, ".1f"),
        _number(None if figures.peak_bytes is None else figures.peak_bytes / 2**20, ",.0f"),
        *speedups,
    )


def _speedups(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return _ABSENT, _ABSENT
    return _number(comparison.prefill_speedup, ".2f", "x"), _number(comparison.decode_speedup, ".2f", "x")


def table_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Returns the rows of the table: for each precision the baseline, unless left out, and the candidate."""
    rows, tokens = [], result.prompt_tokens
    for one in result.dtypes:
        heading, speedups = one.dtype, _speedups(one.comparison)
        if one.baseline is not None:
            unit = ("1.00x", _ABSENT if one.baseline.decode_seconds is None else "1.00x")
            rows.append(_row(heading, BASELINE, one.baseline, tokens, unit))
            heading = ""
        rows.append(_row(heading, CANDIDATE, one.candidate, tokens, speedups))
    return rows


def check_lines(dtype: str, comparison: Comparison, result: DemoResult) -> list[str]:
    """Returns the lines of the check of one precision."""
    quality, equal, wanted = comparison.quality, comparison.equal_tokens, result.new_tokens
    same = equal == wanted
    extent = f": {equal}" if same else f" for the first {equal}"
    verdict = ("PASS" if same else "FAIL") if dtype == "float32" else "info"
    whole = quality.positions == result.prompt_tokens
    compared = "the prompt" if whole else f"the prompt's last {quality.positions:,} tokens"
    return [
        f"{verdict}  {dtype}: same greedy tokens{extent} of {wanted} "
        f"(closest choice was {comparison.smallest_margin:.3g} ahead)",
        f"      largest difference of logits: {quality.logit_difference:.2g} over {compared}, "
        f"{quality.logit_difference_last:.2g} at the last",
        f"      perplexity of {compared}: {quality.perplexity_baseline:.4f} {BASELINE}, "
        f"{quality.perplexity_candidate:.4f} {CANDIDATE}",
    ]


def _print_check(result: DemoResult, file: TextIO) -> None:
    compared = [(one.dtype, one.comparison) for one in result.dtypes if one.comparison is not None]
    if compared:
        print("\nCheck", file=file)
    for dtype, comparison in compared:
        print(*check_lines(dtype, comparison, result), sep="\n", file=file)


def print_report(result: DemoResult, file: TextIO | None = None) -> None:
    """Prints the table and the check of one model.

    Args:
        result: Its results.
        file: Where to; standard output by default.
    """
    file = sys.stdout if file is None else file
    rounds = ", ".join(f"{one.dtype} {one.rounds}" for one in result.dtypes)
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    title = (
        f"{result.model}: {result.prompt_tokens:,} tokens of prompt, {result.new_tokens} generated greedily, "
        f"{threads}, {cpu_name()}"
    )
    print(file=file)
    print_table(COLUMNS, table_rows(result), title=title, file=file)
    print(f"Medians of interleaved rounds ({rounds}); memory is the peak above the loaded model.", file=file)
    _print_check(result, file)
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


def as_document(results: Sequence[DemoResult]) -> dict[str, Any]:
    """Returns the results of all models as a JSON document, in seconds and bytes."""
    return {
        "cpu": cpu_name(),
        "versions": _versions(),
        "passed": all(result.passed for result in results),
        "models": [asdict(result) for result in results],
    }
