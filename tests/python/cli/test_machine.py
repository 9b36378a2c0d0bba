"""The processor's name."""

import pytest

from subquad.cli import machine

X86 = """processor\t: 0
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (X86, "AMD EPYC (family 26, model 2)"),
        ("model name : Cortex\n", "Cortex"),
        ("processor : 0\nBogoMIPS : 50\n", None),
        ("", None),
    ],
)
def test_description(text, name):
    assert machine._describe(text) == name


def test_name_without_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine.cpu_name() == "aarch64"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC (family 26, model 2)", "amd-epyc-family-26-model-2"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon-cpu-2-20ghz"),
        ("../..", "unknown"),
    ],
)
def test_slug(name, slug):
    assert machine.slug(name) == slug
