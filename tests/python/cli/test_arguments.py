"""Types of arguments, and the errors about libraries that are missing."""

import argparse

import pytest

import subquad
from subquad.cli import arguments, dependencies
from subquad.cli.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("4096", 4096), ("4,096", 4096), ("4_096", 4096), (" 7 ", 7)]
)
def test_positive_int(text, value):
    assert arguments.positive_int(text) == value


@pytest.mark.parametrize("text", ["", ",", "0", "-3", "1.0", "1e3", "four", "inf"])
def test_positive_int_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        arguments.positive_int(text)


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.5", 0.5), ("1e3", 1000.0)])
def test_positive_float(text, value):
    assert arguments.positive_float(text) == value


@pytest.mark.parametrize("text", ["", "0", "-0.5", "nan", "inf", "1e999", "half"])
def test_positive_float_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        arguments.positive_float(text)


def test_the_most_threads_are_what_subquad_takes(keep_threads):
    assert arguments.thread_count(str(arguments.MAX_THREADS)) == arguments.MAX_THREADS
    subquad.set_num_threads(arguments.MAX_THREADS)
    with pytest.raises(ValueError, match="num_threads"):
        subquad.set_num_threads(arguments.MAX_THREADS + 1)
    with pytest.raises(argparse.ArgumentTypeError, match="1024"):
        arguments.thread_count(str(arguments.MAX_THREADS + 1))


def test_require_names_what_is_missing_and_the_extra():
    dependencies.require("subquad demo", "demo", ["argparse", "numpy"])
    with pytest.raises(UserError, match=r'^x needs nosuchlib, which is not .*: pip install "subquad\[y\]"$'):
        dependencies.require("x", "y", ["argparse", "nosuchlib"])
    with pytest.raises(UserError, match="needs nosuchlib, another, which are not installed"):
        dependencies.require("x", "y", ["nosuchlib", "another"])


def test_installed_version():
    assert dependencies.installed_version("numpy") == __import__("numpy").__version__
    assert dependencies.installed_version("no-such-package") is None
