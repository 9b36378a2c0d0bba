"""What tests of the real package share: it, installed or as it is, on one thread."""

import warnings
from collections.abc import Iterator

import pytest
import torch

import subquad
import subquad.fla

with warnings.catch_warnings():
    # It speaks of the missing GPU, and torch.jit of its age.
    warnings.simplefilter("ignore")
    import fla.layers  # noqa: F401


@pytest.fixture(autouse=True)
def few_threads(keep_num_threads: None) -> Iterator[None]:
    """Small calls would wait for other threads where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    subquad.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def installed() -> Iterator[None]:
    """`subquad.fla` is installed."""
    subquad.fla.install()
    yield
    subquad.fla.uninstall()
