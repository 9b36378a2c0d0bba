"""`docs/hf_support.md`: the outcome for every model, as one line of Markdown each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import transformers

from .checks import CHECKS
from .comparison import TOLERANCE
from .survey import AS_UNPATCHED, FAILED, OK, UNUSED, Row

PATH = Path(__file__).parents[4] / "docs" / "hf_support.md"

_SIGNS = {OK: "✓", FAILED: "✗", AS_UNPATCHED: "=", UNUSED: "·"}
_TEXT = """\
# Models

What `subquad.hf.patch` does for the models of transformers {version}, one class for each model type. Written by `make zoo`, which
builds each model from its default configuration, made tiny (`tests/python/hf/zoo/sizes.py`) and with random weights, and runs it
patched and, with the same weights, unpatched with eager attention, in float32. {built} models are built, of {all}.

- **replaced**: modules whose attention subquad computes, with the implementation they had if it was not "sdpa", and recurrent
  layers.
- **delegated**: arguments for which calls went back to that implementation.
- **dense**: origins of masks that were read as one entry for each query and key.
- **left alone**: modules that look like attention but do not use `AttentionInterface`.

The checks, of outputs within {tolerance:.0e} of the largest value and of equal tokens:

| | |
| --- | --- |
| F | a batch without a mask |
| R, L | a batch padded on the right, on the left |
| G, GL, GS | `generate`, greedy, with a cache; with padding on the left; with that and a static cache |
| P, PL | a prompt fed in two pieces through the cache; with padding on the left |
| I, IG | images among the text, padded on the left: forward, `generate` |

✓ holds, ✗ does not, · does not apply (remarks below where eager attention fails), = as without the patch, where transformers' own
implementation is not as eager attention is.

"""
_SHORT = dict(zip(CHECKS, ("F", "R", "L", "G", "GL", "GS", "P", "PL", "I", "IG"), strict=True))


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def line(row: Row) -> str:
    """Returns the line of one model."""
    head = (f"`{row.entry.kind}`", row.entry.name)
    if row.not_built is not None:
        return _cells(*head, _escape(row.not_built))
    signs = (_SIGNS[row.checks[name]] for name in CHECKS)
    lists = (row.replaced, row.delegated, row.dense, row.left_alone)
    return _cells(*head, *(", ".join(one) for one in lists), *signs)


def remarks(row: Row) -> list[str]:
    """Returns what there is to say about checks of a model that did not fail, each with its checks."""
    checks: dict[str, list[str]] = {}
    for name in CHECKS:
        if name in row.notes and row.checks[name] != FAILED:
            checks.setdefault(row.notes[name], []).append(_SHORT[name])
    return [f"- `{row.entry.kind}`, {', '.join(names)}: {_escape(note)}" for note, names in checks.items()]


def render(rows: Sequence[Row]) -> str:
    """Returns the whole file."""
    rows = sorted(rows, key=lambda row: row.entry)
    built = [row for row in rows if row.not_built is None]
    text = _TEXT.format(
        version=transformers.__version__, built=len(built), all=len(rows), tolerance=TOLERANCE
    )
    heads = ("type", "class", "replaced", "delegated", "dense", "left alone", *_SHORT.values())
    lines = [_cells(*heads), _cells(*["---"] * len(heads)), *map(line, built)]
    lines += ["", "## Remarks", "", *(text for row in built for text in remarks(row))]
    lines += ["", "## Not built", "", _cells("type", "class", "why"), _cells("---", "---", "---")]
    lines += [line(row) for row in rows if row.not_built is not None]
    return text + "\n".join(lines) + "\n"


def documented() -> dict[str, str]:
    """Returns the lines of the file as it is, by model type."""
    found = re.findall(r"^\| `([^`]+)` \|.*$", PATH.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [one for one in PATH.read_text(encoding="utf-8").splitlines() if one.startswith("| `")]
    return dict(zip(found, lines, strict=True))


def documented_version() -> str:
    """Returns the version of transformers that the file is about."""
    found = re.search(r"models of transformers (\S+),", PATH.read_text(encoding="utf-8"))
    return found.group(1) if found else ""
