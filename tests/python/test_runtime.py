"""Threads, environment variables, and what `show_config` prints."""

import os

import numpy as np
import pytest

import subquad


def test_set_num_threads(keep_num_threads):
    for number in (1, 7, 1024):
        subquad.set_num_threads(number)
        assert subquad.get_num_threads() == number


@pytest.mark.parametrize("number", [0, -1, 1025, 2**40])
def test_impossible_numbers_are_refused(number, keep_num_threads):
    before = subquad.get_num_threads()
    with pytest.raises(ValueError, match=rf"num_threads: expected an integer from 1 to 1024, got {number}"):
        subquad.set_num_threads(number)
    assert subquad.get_num_threads() == before


@pytest.mark.parametrize("number", [1.5, "2", None])
def test_what_is_no_integer_is_refused(number):
    with pytest.raises(TypeError):
        subquad.set_num_threads(number)


def test_integers_of_any_kind(keep_num_threads):
    subquad.set_num_threads(np.int64(3))
    assert subquad.get_num_threads() == 3


NUMBER = "import subquad; print(subquad.get_num_threads())"


def test_default_is_what_the_process_may_use(run_python):
    code = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {NUMBER}"
    assert run_python(code) == "1\n"
    assert 1 <= int(run_python(NUMBER)) <= len(os.sched_getaffinity(0))


def test_default_is_torchs_when_it_is_loaded(run_python):
    code = f"{NUMBER}; import torch; torch.set_num_threads(3); {NUMBER}; torch.set_num_threads(5); {NUMBER}"
    assert run_python(code).splitlines()[1:] == ["3", "5"]


def test_the_variable_comes_before_torch_and_the_function_before_both(run_python):
    code = f"import torch; torch.set_num_threads(3); {NUMBER}; subquad.set_num_threads(4); {NUMBER}"
    assert run_python(code, SUBQUAD_NUM_THREADS="2") == "2\n4\n"


@pytest.mark.parametrize(
    "variable", ["SUBQUAD_NUM_THREADS", "SUBQUAD_ISA", "SUBQUAD_BLOCK_Q", "SUBQUAD_BLOCK_K"]
)
def test_an_empty_variable_is_none(variable, run_python):
    call = "import numpy as np, subquad; q = np.ones((1, 2, 1, 4)); print(subquad.attention(q, q, q).sum())"
    assert float(run_python(call, **{variable: ""})) == 8


CALL = """
    import numpy as np, subquad
    q = np.ones((1, 2, 1, 4))
    for _ in range(2):
        try:
            subquad.attention(q, q, q)
        except ValueError as error:
            print(error)
    print("alive")
"""


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("SUBQUAD_NUM_THREADS", "0", "an integer from 1 to 1024"),
        ("SUBQUAD_NUM_THREADS", "many", "an integer from 1 to 1024"),
        ("SUBQUAD_NUM_THREADS", "1.5", "an integer from 1 to 1024"),
        ("SUBQUAD_NUM_THREADS", "-2", "an integer from 1 to 1024"),
        ("SUBQUAD_NUM_THREADS", "99999999999999999999999", "an integer from 1 to 1024"),
        ("SUBQUAD_ISA", "sse9", "one of scalar, avx2, avx512, avx512bf16, amx"),
        ("SUBQUAD_ISA", "AVX2", "one of scalar, avx2, avx512, avx512bf16, amx"),
        ("SUBQUAD_BLOCK_Q", "0", "an integer from 1 to 4096"),
        ("SUBQUAD_BLOCK_K", "x", "an integer from 1 to 4096"),
    ],
)
def test_a_wrong_variable_is_named(variable, value, expected, run_python):
    message = f"{variable}: expected {expected}, got {value}"
    assert run_python(CALL, **{variable: value}).splitlines() == [message, message, "alive"]


def test_a_variable_that_is_no_text_is_refused(run_python):
    code = f"""
        import os, subprocess, sys
        environment = {{**os.environb, b"SUBQUAD_ISA": b"\\xff"}}
        done = subprocess.run([sys.executable, "-c", {CALL!r}.replace("\\n    ", "\\n")], env=environment,
                              capture_output=True, text=True)
        print(done.stdout)
    """
    assert "SUBQUAD_ISA: expected one of" in run_python(code)


def test_the_level_may_only_be_lowered(run_python, levels):
    code = "import subquad; print(subquad._native.config()['level'])"
    for level in levels:
        assert run_python(code, SUBQUAD_ISA=level) == f"{level}\n"
    assert run_python(code, SUBQUAD_ISA="amx") == f"{levels[-1]}\n"


def test_show_config(capsys, levels):
    subquad.show_config()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["version"] == subquad.__version__
    assert lines["profile"] in {"release", "debug"}
    assert lines["level"] in levels
    assert lines["detected level"] == levels[-1]
    assert lines["levels"] == ", ".join(levels)
    assert lines["num threads"] == str(subquad.get_num_threads())
    assert int(lines["available threads"]) >= 1


def test_probes_measure():
    flops = subquad._native.probe_peak("f32", seconds=0.01, num_threads=1)
    assert 1e8 < flops < 1e13
    assert (
        1e7
        < subquad._native.probe_read([np.ones(1 << 20, "f4"), np.ones((3, 5), "f2")], num_threads=1)
        < 1e13
    )
    slow = subquad._native.probe_peak("f32", level="scalar", seconds=0.01, num_threads=1)
    assert 1e7 < slow < 1e12
