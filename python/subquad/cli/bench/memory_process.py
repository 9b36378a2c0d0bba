"""The memory of one case, measured in a process of its own that has only called for one token before.

Scratch which is kept from call to call counts too. The figure is the peak of the whole process, hence an upper
bound: it includes the pool's threads and the pages of code that the call touches for the first time.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import NamedTuple

from subquad.cli.bench.shapes import NamedShape

_CHILD = "subquad.cli.bench.memory_child"


class Memory(NamedTuple):
    """What a process found.

    Attributes:
        bytes: What its call used beyond inputs and results; `None` where it cannot be known.
        method: How it was measured.
        failure: What is wrong with the process or its result; empty if nothing.
    """

    bytes: int | None
    method: str
    failure: str


def measure(table: str, shape: NamedShape, dtype: str, threads: int) -> Memory:
    """Measures the calls of a shape, on NumPy arrays.

    Args:
        table: The table of shapes that it is of, which says what is called.
        shape: The shape.
        dtype: Its element type, one that NumPy has.
        threads: The thread count.
    """
    request = json.dumps({"table": table, "shape": asdict(shape), "dtype": dtype, "threads": threads})
    # NumPy's huge pages would fill up around the arrays while the call runs, and count as its memory.
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-m", _CHILD]
    done = subprocess.run(
        command, input=request, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Memory(None, "unavailable", last[0])
    answer = json.loads(done.stdout)
    return Memory(answer["bytes"], answer["method"], answer["failure"])
