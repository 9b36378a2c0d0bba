"""Which of the planned cases can be run here."""

from collections.abc import Sequence
from typing import TypeVar

from subquad.cli.bench import tensors
from subquad.cli.bench.outcome import Outcome, Settings
from subquad.cli.bench.shapes import NamedShape

AnyShape = TypeVar("AnyShape", bound=NamedShape)


def possible_cases(
    cases: Sequence[tuple[AnyShape, str]], settings: Settings, outcome: Outcome
) -> list[tuple[AnyShape, str]]:
    """Returns the cases of dtypes that exist here, and notes in `outcome` if others were left out."""
    possible = [case for case in cases if settings.use_torch or tensors.numpy_dtype(case[1]) is not None]
    if len(possible) < len(cases):
        outcome.notes.append(
            'bfloat16 was left out: NumPy has it only with ml_dtypes, torch is in "subquad[bench]"'
        )
    return possible
