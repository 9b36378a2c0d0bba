"""States of composed operators from one call to the next, and of packed sequences."""

import numpy as np
import pytest
import torch

from subquad import ops
from subquad.reference import recurrent as oracles

from .cases import DTYPES, Sizes, about, bounds_of, spans, wide
from .composed import FORMS, call, check_found, draw_inputs, draw_states, expect, part, problem

CONTINUED = [name for name in FORMS if "abc" not in name]
LENGTHS = {
    "some empty": (0, 5, 0, 64, 1, 33, 0),
    "all empty": (0, 0),
    "one": (40,),
    "equal": (16, 16, 16),
    "none": (),
}


def joined(parts):
    """The outputs of calls one after the other, and the states of the last one."""
    return np.concatenate([o for o, _ in parts], axis=1), parts[-1][1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CONTINUED)
def test_two_parts_are_the_whole(form, dtype):
    given = problem(FORMS[form][1], Sizes(tokens=100), dtype)
    for cut in (0, 1, 33, 64, 99, 100):
        first = call(form, part(given.inputs, 0, cut), given.states)
        second = call(form, part(given.inputs, cut, 100), first[1])
        with about(cut):
            check_found(joined([first, second]), given.expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CONTINUED)
def test_token_by_token(form, dtype):
    given = problem(FORMS[form][1], Sizes(tokens=17), dtype)
    parts = [((), given.states)]
    for t in range(17):
        parts.append(call(form, part(given.inputs, t, t + 1), parts[-1][1]))
    check_found(joined(parts[1:]), given.expected, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_are_separate(form, dtype):
    family = FORMS[form][1]
    for name, lengths in LENGTHS.items():
        inputs = draw_inputs(family, Sizes(batch=1, tokens=sum(lengths)), dtype)
        states = draw_states(family, Sizes(), dtype, sequences=len(lengths))
        o, finals = call(form, inputs, states, cu_seqlens=bounds_of(lengths))
        assert len(finals) == len(states)
        assert all(len(final) == len(lengths) for final in finals)
        outputs = [np.zeros((1, 0, *o.shape[2:]))]
        for n, span in enumerate(spans(lengths)):
            one = expect(family, part(inputs, *span), tuple(x[n : n + 1] for x in states))
            outputs.append(one[0])
            with about(name, n):
                check_found((o[:, slice(*span)], tuple(x[n : n + 1] for x in finals)), one, dtype)
        assert o.shape == np.concatenate(outputs, axis=1).shape


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_of_torch(form, kind, convert_all):
    family, lengths = FORMS[form][1], LENGTHS["some empty"]
    inputs = draw_inputs(family, Sizes(batch=1, tokens=sum(lengths)), "float32")
    states = draw_states(family, Sizes(), "float32", sequences=len(lengths))
    bounds = bounds_of(lengths).astype(kind)
    expected = expect(family, inputs, states, cu_seqlens=bounds)
    foreign = convert_all("torch", inputs), convert_all("torch", states)
    check_found(call(form, *foreign, cu_seqlens=torch.from_numpy(bounds)), expected, "float32")
    expected = expect(family, inputs, cu_seqlens=bounds)
    check_found(call(form, foreign[0], cu_seqlens=torch.from_numpy(bounds)), expected, "float32")


SSD = "mamba_chunk_scan_combined ssd"


def numbers_of_sequences(rows, tokens):
    """The sequence of each token: numbers that change and come again, in a row that begins with sequence 0 and in others."""
    generator = np.random.default_rng(4)
    drawn = np.where(generator.random((rows, tokens)) < 0.8, 0, generator.integers(0, 4, (rows, tokens)))
    drawn[0, 0], drawn[1:, 0] = 0, 2
    return drawn


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_sequences(dtype, library, convert, convert_all):
    for tokens in (1, 2, 70):
        given = problem("ssd", Sizes(batch=3, tokens=tokens), dtype)
        for kind in (np.int32, np.int64):
            seq_idx = numbers_of_sequences(3, tokens).astype(kind)
            for states in (given.states, None):
                expected = expect("ssd", given.inputs, states, seq_idx=seq_idx)
                foreign = None if states is None else convert_all(library, states)
                found = call(
                    SSD, convert_all(library, given.inputs), foreign, seq_idx=convert(library, seq_idx)
                )
                with about(tokens, kind, states is None):
                    check_found(found, expected, dtype)


def test_numbers_of_sequences_without_tokens():
    given = problem("ssd", Sizes(batch=3, tokens=0), "float32")
    check_found(
        call(SSD, given.inputs, given.states, seq_idx=np.zeros((3, 0), int)), given.expected, "float32"
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_numbers_within_packed_sequences(lengths):
    tokens = sum(lengths)
    inputs = draw_inputs("ssd", Sizes(batch=1, tokens=tokens), "float32")
    states = draw_states("ssd", Sizes(), "float32", sequences=len(lengths))
    of_each = np.concatenate([np.full(length, n) for n, length in enumerate((0, *lengths))])
    for seq_idx in (of_each, np.arange(tokens) // 3, np.zeros(tokens)):
        options = {"seq_idx": seq_idx.astype(int)[None], "cu_seqlens": bounds_of(lengths)}
        expected = expect("ssd", inputs, states, **options)
        check_found(call(SSD, inputs, states, **options), expected, "float32")


def test_states_of_scans():
    lengths = (5, 30, 2)
    inputs = draw_inputs("ssd", Sizes(batch=1, tokens=37), "float32")
    scan = ops.mamba_chunk_scan_combined
    options = {"chunk_size": 256, "dt_softplus": True, "cu_seqlens": bounds_of(lengths)}
    y, finals = scan(**inputs, **options, return_varlen_states=True)
    _, last = scan(**inputs, **options, return_final_states=True)
    found = scan(**inputs, **options, return_final_states=True, return_varlen_states=True)
    for x, expected in zip(found, (y, last, finals), strict=True):
        np.testing.assert_array_equal(x, expected)
    assert (finals.shape[0], last.shape[0]) == (3, 1)
    np.testing.assert_array_equal(last[0], finals[-1])
    np.testing.assert_array_equal(scan(**inputs, **options), y)
    narrow = scan(**inputs, **options, return_varlen_states=True, state_dtype=np.float16)[1]
    assert narrow.dtype == np.float16
    np.testing.assert_array_equal(narrow, finals.astype(np.float16))


def test_slots_may_have_one_state():
    given = problem("gsa", Sizes(), "float64")
    for states in ((given.states[0], None), [None, given.states[1]]):
        filled = [np.zeros_like(x) if y is None else y for x, y in zip(given.states, states, strict=True)]
        o, finals = ops.chunk_gsa(**given.inputs, initial_state=states, output_final_state=True)
        precise = {name: wide(x) for name, x in given.inputs.items()}
        check_found((o, finals), oracles.gsa(**precise, initial_state=tuple(filled)), "float64")
