"""The demo's text: Python's language reference, which every CPython carries for its interactive help."""

from importlib import import_module
from typing import Any

from subquad.cli.errors import UserError

# Enough for English text and any tokenizer; only bounds how much is tokenised.
_CHARACTERS_PER_TOKEN = 12


def language_reference() -> str:
    """Returns all topics of `pydoc_data.topics`, each under its name, in alphabetical order.

    The text is the same for every run of one Python version; versions differ.

    Raises:
        UserError: This Python was built without it.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        raise UserError(
            "this Python lacks pydoc_data.topics (the text the demo reads); use a complete CPython"
        ) from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def prompt_ids(tokenizer: Any, count: int, text: str | None = None) -> list[int]:
    """Returns exactly `count` token ids from the beginning of the text.

    A token that the model expects in front of every text is the first of them.

    Args:
        tokenizer: A transformers tokenizer.
        count: How many.
        text: The text; the language reference by default.

    Raises:
        UserError: The text is too short.
    """
    text = language_reference() if text is None else text
    ids: list[int] = tokenizer(text[: count * _CHARACTERS_PER_TOKEN], verbose=False)["input_ids"]
    if len(ids) < count:
        raise UserError(f"--tokens: the text gives {len(ids)} tokens, {count} were asked for")
    return ids[:count]
