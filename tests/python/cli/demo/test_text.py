"""The demo's text and prompt."""

import sys
from types import ModuleType

import pytest

from subquad.cli.demo import text
from subquad.cli.errors import UserError


class Words:
    """A tokenizer whose tokens are words, numbered by their length."""

    def __init__(self, *start: int) -> None:
        self.start = start

    def __call__(self, string: str, *, verbose: bool) -> dict[str, list[int]]:
        assert not verbose
        return {"input_ids": [*self.start, *(len(word) for word in string.split())]}


def test_the_text_is_long_and_the_same_each_time():
    reference = text.language_reference()
    assert reference == text.language_reference()
    assert len(reference) > 300_000
    assert "with" in reference
    assert reference.startswith('The "assert" statement\n')


def test_a_python_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="lacks pydoc_data"):
        text.language_reference()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", ModuleType("pydoc_data.topics"))
    with pytest.raises(UserError, match="lacks pydoc_data"):
        text.language_reference()


def test_topics_are_in_alphabetical_order(monkeypatch):
    topics = ModuleType("pydoc_data.topics")
    topics.topics = {"b": "\nsecond\n", "a": "first\n\n"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", topics)
    assert text.language_reference() == "first\n\nsecond"


def test_prompt():
    assert text.prompt_ids(Words(), 3, "a bb ccc dddd eeeee") == [1, 2, 3]
    assert len(text.prompt_ids(Words(), 32000)) == 32000
    assert text.prompt_ids(Words(), 10) == text.prompt_ids(Words(), 4096)[:10]


def test_what_a_model_expects_in_front_counts():
    assert text.prompt_ids(Words(99), 3, "a bb ccc dddd eeeee") == [99, 1, 2]


def test_a_text_that_is_too_short():
    with pytest.raises(UserError, match=r"^--tokens: the text gives 2 tokens, 3 were asked for$"):
        text.prompt_ids(Words(), 3, "a bb")
