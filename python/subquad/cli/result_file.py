"""Results as a JSON file: whether it can be written, asked before the work, and the writing after it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from subquad.cli.errors import UserError


def check_writable(path: Path) -> None:
    """Finds out that a file cannot be written before minutes are spent on computing what goes into it.

    Raises:
        UserError: `path` is a directory, its directory does not exist, or one of them is write-protected.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"cannot write {path}: its directory does not exist")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"cannot write {path}: permission denied")


def _finite(value: Any) -> Any:
    # JSON has no NaN or infinity; a wrong result has both, and is what one wants to read about.
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document; NaN and infinities become null.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
