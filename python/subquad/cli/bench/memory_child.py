"""The process that measures the memory of one call: request as JSON on stdin, answer on stdout."""

import json
import sys

import numpy as np

import subquad
from subquad.cli.bench import tensors, verify
from subquad.cli.bench.shape_file import build
from subquad.cli.bench.shapes import MemoryShape
from subquad.cli.peak_memory import peak_memory


def main() -> None:
    """Makes the inputs and a touched output, measures one call, checks its result."""
    request = json.load(sys.stdin)
    shape, dtype = build(MemoryShape, request["shape"]), request["dtype"]
    inputs = tensors.make_inputs(shape, dtype, use_torch=False)
    # NaN both touches the pages before the measurement and cannot be mistaken for a result.
    out = np.full((shape.batch, shape.queries, shape.heads, shape.head_dim_v), np.nan, dtype=inputs.q.dtype)
    subquad.set_num_threads(request["threads"])
    # What the first call of a process loads (code, modules) is not memory of the measured one.
    subquad.attention(*(each[:, :1] for each in inputs), causal=shape.causal)
    with peak_memory() as peak:
        subquad.attention(*inputs, causal=shape.causal, out=out)
    failure = verify.check(shape, dtype, inputs, out, None).failure
    json.dump({"bytes": peak.bytes, "method": peak.method, "failure": failure}, sys.stdout)


if __name__ == "__main__":
    main()
