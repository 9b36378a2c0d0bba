"""Errors that are the user's to mend, and the check for optional dependencies."""

from collections.abc import Iterable
from importlib.util import find_spec


class UserError(Exception):
    """Something the user can mend: shown as one line without a traceback, with exit status 2."""


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Returns those of `modules` (top-level import names) that are not installed; imports none."""
    return [name for name in modules if find_spec(name) is None]


def require(command: str, extra: str, modules: Iterable[str]) -> None:
    """Checks that the modules a command needs are installed.

    Args:
        command: The command as the user typed it, for the message.
        extra: The extra of the `subquad` package that installs all of them.
        modules: Top-level import names.

    Raises:
        UserError: Some are missing; the message names them and the extra.
    """
    if missing := missing_modules(modules):
        names = ", ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f'{command} needs {names}, which {verb} not installed: pip install "subquad[{extra}]"'
        )
