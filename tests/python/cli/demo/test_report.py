"""The demo's output."""

import io
import math

import pytest

from subquad.cli.demo import report
from subquad.cli.demo.quality import Quality
from subquad.cli.demo.results import Comparison, Figures


def text(result) -> str:
    file = io.StringIO()
    report.print_report(result, file)
    return file.getvalue()


def test_table(make_result):
    assert report.table_rows(make_result()) == [
        ("float32", "sdpa", "12.50", "328", "41.2", "300", "1.00x", "1.00x"),
        ("", "subquad", "5.00", "819", "20.6", "150", "2.50x", "2.00x"),
        ("bfloat16", "sdpa", "12.50", "328", "41.2", "300", "1.00x", "1.00x"),
        ("", "subquad", "5.00", "819", "20.6", "150", "2.50x", "2.00x"),
    ]


def test_what_is_not_known(make_result):
    figures = Figures(12.5, None, None, (1,))
    comparison = Comparison(2.5, None, 1, 0.0, Quality(4096, 14.0, 14.0, 0.0, 0.0))
    rows = report.table_rows(make_result(baseline=figures, candidate=figures, comparison=comparison))
    assert rows[0] == ("float32", "sdpa", "12.50", "328", "-", "-", "1.00x", "-")
    assert rows[1] == ("", "subquad", "12.50", "328", "-", "-", "2.50x", "-")


def test_without_a_baseline(make_result):
    result = make_result(baseline=None, comparison=None)
    assert report.table_rows(result) == [
        ("float32", "subquad", "5.00", "819", "20.6", "150", "-", "-"),
        ("bfloat16", "subquad", "5.00", "819", "20.6", "150", "-", "-"),
    ]
    shown = text(result)
    assert "Check" not in shown
    assert "sdpa" not in shown
    assert "Patched" in shown


def test_only_the_last_positions_compared(make_result):
    shown = text(make_result(quality=Quality(1024, 14.25, 14.26, 1.5e-4, 2.5e-5)))
    assert "logits: 0.00015 over the prompt's last 1,024 tokens, 2.5e-05 at the last\n" in shown
    assert "      perplexity of the prompt's last 1,024 tokens: 14.2500 sdpa, 14.2600 subquad\n" in shown


def test_passed(make_result):
    lines = text(make_result()).splitlines()
    assert lines[1].startswith("Tiny-1M: 4,096 tokens of prompt, 64 generated greedily, 2 threads, ")
    assert "PASS  float32: same greedy tokens: 64 of 64 (closest choice was 0.0123 ahead)" in lines
    assert (
        "info  bfloat16: same greedy tokens for the first 40 of 64 (closest choice was 0.0123 ahead)" in lines
    )
    assert "      largest difference of logits: 0.00015 over the prompt, 2.5e-05 at the last" in lines
    assert "      perplexity of the prompt: 14.2500 sdpa, 14.2600 subquad" in lines
    assert lines.count("Patched") == 1  # the same in both precisions
    assert lines[-1] == "200 s in all."
    assert not any("FAIL" in line for line in lines)


def test_failed(make_result):
    shown = text(make_result(equal=63))
    assert "FAIL  float32: same greedy tokens for the first 63 of 64" in shown
    assert "PASS" not in shown


def test_broken_numbers_are_shown(make_result):
    result = make_result(quality=Quality(4096, 14.0, math.inf, math.nan, math.nan))
    shown = text(result)
    assert "nan over the prompt" in shown
    assert "inf subquad" in shown


def test_to_standard_output(make_result, capsys):
    report.print_report(make_result())
    assert "PASS" in capsys.readouterr().out


def test_document(make_result):
    pytest.importorskip("transformers")
    assert report.as_document([make_result()])["passed"] is True
    document = report.as_document([make_result(), make_result(equal=2)])
    assert document["passed"] is False
    assert set(document["versions"]) == {"python", "subquad", "torch", "transformers"}
    first, second = document["models"]
    assert (first["model"], first["threads"]) == ("Tiny-1M", 2)
    assert first["dtypes"][0]["candidate"]["prefill_seconds"] == 5.0
    assert second["dtypes"][0]["comparison"]["equal_tokens"] == 2
    assert second["dtypes"][1]["comparison"]["quality"]["perplexity_baseline"] == 14.25
