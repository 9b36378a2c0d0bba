"""Which optional libraries are installed, found out without importing any."""

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from subquad.cli.errors import UserError


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Returns those of `modules` (top-level import names) that are not installed."""
    return [name for name in modules if find_spec(name) is None]


def not_installed(needs: str, names: Sequence[str], install: str) -> UserError:
    """Returns the error about something that is not installed.

    Args:
        needs: Who needs it, up to the verb: `"subquad demo needs"`.
        names: What is missing, at least one name.
        install: The command that installs it.
    """
    verb = "is" if len(names) == 1 else "are"
    return UserError(f"{needs} {', '.join(names)}, which {verb} not installed: {install}")


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
        raise not_installed(f"{command} needs", missing, f'pip install "subquad[{extra}]"')


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package (its name on PyPI); `None` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
