"""What tests of recurrent operators share: ways to work through tokens, and conversions of whole calls."""

import types

import pytest

import subquad
import subquad.ops.recurrent as shared

# How the engine works through tokens: as their number asks for, one by one, in chunks.
WAYS = {"auto": {}, "steps": {"step": True}, **{f"chunks of {n}": {"chunk_size": n} for n in (16, 32, 64)}}


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads):
    """Thousands of small calls would wait for other threads where the machine is busy. They change no bits: see `test_arrays`."""
    subquad.set_num_threads(1)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way, whatever an operator's signature lets one choose."""
    forced = WAYS[request.param]
    native = shared._native.recurrent

    def recurrent(q, k, v, options, output_final_state):
        return native(q, k, v, {**options, **forced}, output_final_state)

    monkeypatch.setattr(shared, "_native", types.SimpleNamespace(recurrent=recurrent))
    return request.param


@pytest.fixture
def convert_all(convert):
    """Converts copies of all arrays of a call, `convert_all(library, arrays)`, a dictionary or a tuple."""

    def convert_all(library, arrays):
        if isinstance(arrays, dict):
            return {name: convert(library, x.copy()) for name, x in arrays.items()}
        return tuple(convert(library, x.copy()) for x in arrays)

    return convert_all
