"""The command as a whole: parsing, exit statuses, one-line errors, and no heavy imports."""

import os
import signal
import subprocess
import sys

import pytest

import subquad
from subquad import cli as command_line
from subquad.cli import errors

NAMES = [command.name for command in command_line.COMMANDS]


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text.removesuffix("\n")


@pytest.fixture
def raising(monkeypatch):
    """Makes `subquad info` raise."""

    def arrange(error: BaseException) -> None:
        def execute(_options: object) -> int:
            raise error

        monkeypatch.setattr("subquad.cli.info.execute", execute)

    return arrange


def test_version(cli, capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{subquad.__version__}\n"


def test_no_command_shows_the_help_and_is_an_error(cli):
    answer = cli()
    assert answer.status == 2
    assert answer.out == ""
    assert all(name in answer.err for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["walk"], "invalid choice: 'walk'"),
        (["info", "--walk"], "unrecognized arguments: --walk"),
        (["info", "walk"], "unrecognized arguments: walk"),
        (["bench", "--repeat", "0"], "--repeat: expected a whole number of at least 1, got '0'"),
        (["bench", "--repeat", "two"], "got 'two'"),
        (["bench", "--repeat"], "--repeat: expected one argument"),
        (["bench", "--time-budget", "-1"], "--time-budget: expected a number above 0, got '-1'"),
        (["bench", "--threads", "1025"], "--threads: expected at most 1024 threads, got '1025'"),
        (["demo", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["demo", "--tokens", "1.5"], "--tokens: expected a whole number"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(cli, arguments, message):
    answer = cli(*arguments)
    assert answer.status == 2
    assert answer.out == ""
    line = one_line(answer.err)
    assert line.startswith("subquad: error: ")
    assert message in line
    assert "--help)" in line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.UserError("no such thing"), 2, "subquad: error: no such thing"),
        (errors.CheckError("nothing was patched"), 1, "subquad: check failed: nothing was patched"),
    ],
)
def test_errors_are_one_line(cli, raising, error, status, line):
    raising(error)
    answer = cli("info")
    assert (answer.status, one_line(answer.err)) == (status, line)


def test_interrupt_is_130(cli, raising):
    raising(KeyboardInterrupt())
    answer = cli("info")
    assert answer.status == 130
    assert answer.err == "\nsubquad: interrupted\n"


def test_defects_are_not_hidden(cli, raising):
    raising(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli("info")


def test_status_of_the_command_is_passed_on(cli, monkeypatch):
    monkeypatch.setattr("subquad.cli.info.execute", lambda _options: 1)
    assert cli("info").status == 1


@pytest.mark.parametrize("variable", ["SUBQUAD_ISA", "SUBQUAD_NUM_THREADS"])
def test_wrong_environment_is_one_line(process, variable):
    answer = process("info", **{variable: "many"})
    assert answer.status == 2
    assert variable in one_line(answer.err)
    assert "many" in answer.err


ENABLE_INTERRUPTS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from subquad.cli import main
sys.exit(main())
"""


def test_real_interrupt(tmp_path):
    shapes = tmp_path / "shapes.toml"
    shapes.write_text('[[exact]]\nname = "a"\nqueries = 16\nhead_dim = 8\ndtypes = ["float32"]\n')
    arguments = ["bench", "exact", "--no-torch", "--shapes", shapes, "--repeat", 9999, "--time-budget", 60]
    child = subprocess.Popen(
        # A shell without job control starts background jobs, perhaps this test run, with interrupts ignored.
        [sys.executable, "-c", ENABLE_INTERRUPTS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SUBQUAD_NUM_THREADS": "1"},
    )
    assert child.stderr is not None
    assert child.stderr.readline() == "exact ...\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err == "\nsubquad: interrupted\n"


def test_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "subquad", "bench", "--list"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=30,
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_module_and_script_are_the_same_command():
    def run(*start: str) -> tuple[int, str]:
        done = subprocess.run(
            [*start, "--help"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
            env={"COLUMNS": "100"},
        )
        return done.returncode, done.stdout

    status, text = run(sys.executable, "-m", "subquad")
    assert status == 0
    assert text.startswith("usage: subquad [-h]")
    assert run(sys.executable, "-c", "import sys; from subquad.cli import main; sys.exit(main())") == (
        0,
        text,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in NAMES)])
def test_help_needs_no_library(process, arguments):
    answer = process(*arguments)
    assert answer.status == 0, answer.err
    assert answer.out
    assert answer.err == ""


def test_help_imports_nothing_heavy(process):
    code = (
        "import sys, subquad.cli; subquad.cli.build_parser()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert not set(done.stdout.split()) & {"torch", "transformers", "rich", "platformdirs", "gguf", "numpy"}


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_the_command_does(cli, capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli(name, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: subquad {name}" in out
    module = sys.modules[next(each.module for each in command_line.COMMANDS if each.name == name)]
    assert module.__doc__.splitlines()[0] in out
