"""Runs the checks of one model and notes what came out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import subquad.hf

from .catalogue import Entry
from .checks import CHECKS, Run
from .comparison import TOLERANCE, NotApplicableError, is_finite
from .inputs import Inputs, attempt, candidates, missing
from .models import NotBuiltError, Pair, build, reason

OK, FAILED, UNUSED = "ok", "FAIL", "-"
# What transformers computes without the patch is not what eager attention gives either, and the patched model
# gives the former.
AS_UNPATCHED = "unpatched"
_BYPASSES = "its class does not use AttentionInterface"


@dataclass
class Row:
    """What is known about one model.

    Attributes:
        entry: The model.
        not_built: Why there are no checks; `None` if there are.
        replaced: Classes whose attention subquad computes, with their number and original.
        left_alone: Classes that stay as they were, with their number.
        delegated: Reasons for which the original computed calls.
        dense: Origins of the masks that were read densely.
        checks: Outcome by check.
        notes: What there is to say about checks, by check.
    """

    entry: Entry
    not_built: str | None = None
    replaced: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    delegated: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """What went wrong, one line for each check."""
        return [f"{name}: {self.notes[name]}" for name, outcome in self.checks.items() if outcome == FAILED]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers, which has much to say about random models."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _run(run: Run, model: PreTrainedModel) -> Any:
    torch.manual_seed(0)
    return run.compute(model)


def _find_inputs(model: PreTrainedModel) -> Inputs:
    errors: list[str] = []
    for given in candidates(model):
        output, error = attempt(model, given)
        if error is not None:
            errors.append(reason(error))
        elif is_finite(output):
            return given
        else:
            # Says more than what went wrong in other layouts.
            errors.insert(0, "eager attention gives NaN, or nothing")
    errors.append(f"no rule makes {', '.join(missing(model))}")
    raise NotBuiltError(f"forward: {errors[0]}")


def _judge(run: Run, model: PreTrainedModel, expected: Any, actual: Any) -> tuple[str, str]:
    """Returns outcome and remark for a check in which the patched model is not as eager is."""
    try:
        default = _run(run, model)
        own = run.distance(default, expected)
    except Exception as error:
        return UNUSED, f"unpatched fails: {reason(error)}"
    if own <= TOLERANCE:
        return FAILED, ""
    same = actual is not None and run.distance(actual, default) <= TOLERANCE
    return AS_UNPATCHED if same else FAILED, "unpatched differs from eager"


def _continues(run: Run, report: subquad.hf.Report) -> bool:
    """Whether the unpatched model may not be able to do the check."""
    return run.whole is not None and any(one.continues for one in report.recurrent)


def _run_whole(run: Run, pair: Pair) -> Any:
    assert run.whole is not None
    return _run(Run(run.whole, run.distance), pair.eager)


def _check(row: Row, name: str, pair: Pair, inputs: Inputs) -> None:
    try:
        run = CHECKS[name](pair.eager, inputs)
        expected = _run(run, pair.eager)
        run.distance(expected, expected)
    except NotApplicableError:
        row.checks[name] = UNUSED
        return
    except Exception as error:
        row.checks[name], row.notes[name] = UNUSED, f"eager fails: {reason(error)}"
        return
    actual: Any = None
    with subquad.hf.patch(pair.default) as handle:
        try:
            actual = _run(run, pair.default)
            found = run.distance(actual, expected)
            text = f"differs by {found:.1e}"
        except Exception as error:
            found, text = float("inf"), reason(error)
        report = handle.report()
    row.delegated = sorted({*row.delegated, *(one.reason for one in report.delegated)})
    row.dense = sorted({*row.dense, *report.dense})
    if found <= TOLERANCE:
        row.checks[name] = OK
        return
    if (
        actual is not None
        and _continues(run, report)
        and run.distance(actual, _run_whole(run, pair)) <= TOLERANCE
    ):
        row.checks[name] = OK
        row.notes[name] = "unpatched forgets its state, patched gives what the whole does"
        return
    outcome, remark = _judge(run, pair.default, expected, actual)
    row.checks[name] = outcome
    row.notes[name] = "; ".join(filter(None, (text if outcome == FAILED else "", remark)))


def _cover(row: Row, model: PreTrainedModel) -> None:
    """Notes what a patch covers."""
    try:
        with subquad.hf.patch(model) as handle:
            report = handle.report()
    except ValueError as error:
        raise NotBuiltError(reason(error)) from error
    row.replaced = [
        f"{one.name} x{one.count}" + ("" if one.original == "sdpa" else f" (was {one.original})")
        for one in report.replaced
    ] + [f"{one.name} x{one.count} (recurrent)" for one in report.recurrent]
    row.left_alone = [
        f"{one.name} x{one.count}" + ("" if one.reason == _BYPASSES else f": {one.reason}")
        for one in report.left_alone
    ]


def survey(entry: Entry) -> Row:
    """Builds a model and runs all checks that apply."""
    row = Row(entry)
    with _quiet():
        try:
            pair = build(entry)
            inputs = _find_inputs(pair.eager)
            _cover(row, pair.default)
        except NotBuiltError as error:
            row.not_built = str(error)
            return row
        except Exception as error:
            # Inputs are made from configurations, which may lack what they usually have.
            row.not_built = f"inputs: {reason(error)}"
            return row
        for name in CHECKS:
            _check(row, name, pair, inputs)
    return row
