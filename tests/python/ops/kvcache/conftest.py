"""What tests of calls with a cache share: the libraries whose memory can be written, and the call itself."""

import numpy as np
import pytest

import subquad

from .caches import to_numpy


@pytest.fixture(params=("numpy", "torch"))
def library(request):
    """The libraries whose memory can be written in place."""
    return request.param


@pytest.fixture
def call(library, convert):
    """Calls with arrays of the library sharing the memory of NumPy arrays; returns NumPy arrays."""

    def call(*arrays, **options):
        arrays = [convert(library, x) for x in arrays]
        options = {
            name: convert(library, x) if isinstance(x, np.ndarray) else x for name, x in options.items()
        }
        result = subquad.attention_with_kvcache(*arrays, return_softmax_lse=True, **options)
        assert all(type(x) is type(arrays[0]) for x in result)
        return tuple(to_numpy(x) for x in result)

    return call
