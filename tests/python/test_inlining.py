"""Everything below the entry into an instruction set is compiled for it.

What is not, such as a closure that the compiler chose not to inline, has a call for every vector operation: to a function that
loads its operands from memory, does one thing, and stores the result. Kernels then run up to ten times slower, and nothing else
tells.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator

import pytest

from subquad import _native

# A line of a listing: address, instruction.
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+) *([^#]*)")
BOUNDARIES = {"ret", "jmp", "int3", "ud2", "nop", "nopl", "nopw", "cs", "data16", "xchg"}
# From operands in memory to a result in memory.
LONGEST = 10


def instructions(lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """Yields the address, name and operands of each instruction of a listing."""
    for line in lines:
        if found := INSTRUCTION.match(line):
            yield int(found[1], 16), found[2], found[3].strip()


def called_operations(listing: list[tuple[int, str, str]]) -> dict[str, int]:
    """Returns the vector operations that are functions of their own and are called, and how many calls there are."""
    operations = {}
    body: list[tuple[int, str, str]] = []
    for address, name, operands in listing:
        if name not in BOUNDARIES:
            body.append((address, name, operands))
            continue
        loads = any(re.match(r".*\(%r[sd][ix]\)", operands) for _, _, operands in body)
        if name == "ret" and loads and len(body) <= LONGEST and body[-1][1] == "vzeroupper":
            operations[body[0][0]] = "; ".join(f"{name} {operands}" for _, name, operands in body)
        body = []
    calls: dict[str, int] = {}
    for _, name, operands in listing:
        target = operands.split(" ")[0]
        if name == "call" and re.fullmatch("[0-9a-f]+", target) and int(target, 16) in operations:
            operation = operations[int(target, 16)]
            calls[operation] = calls.get(operation, 0) + 1
    return calls


def test_no_vector_operation_is_a_call():
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump, of binutils")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", _native.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        found = list(instructions(listing.stdout))
    assert len(found) > 100_000
    assert called_operations(found) == {}


def test_a_called_operation_is_found():
    listing = """
   10:\tvmovaps (%rsi),%zmm0
   16:\tvmulps (%rdx),%zmm0,%zmm0
   1c:\tvmovaps %zmm0,(%rdi)
   22:\tvzeroupper
   25:\tret
   26:\tcs nopw 0x0(%rax,%rax,1)
   30:\tpush   %rbp
   31:\tcall   10 <subquad+0x10>
   36:\tcall   40 <subquad+0x40>
   3b:\tret
   40:\tvmovaps %zmm0,%zmm1
   46:\tret
"""
    assert list(called_operations(list(instructions(listing.splitlines()))).values()) == [1]
