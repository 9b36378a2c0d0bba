"""The process that measures the memory of one call: request as JSON on stdin, answer on stdout."""

import json
import sys
from dataclasses import replace

import numpy as np

import subquad
from subquad.cli.bench import backward_calls, contenders, gradient_check, recurrent_calls, tensors, verify
from subquad.cli.bench.backward_shape import BackwardShape
from subquad.cli.bench.memory_process import Memory
from subquad.cli.bench.recurrent_shape import RecurrentShape
from subquad.cli.bench.shape_file import build
from subquad.cli.bench.shapes import ITEM_BYTES, MemoryShape
from subquad.cli.bench.tensors import Inputs
from subquad.cli.peak_memory import peak_memory


def _forward(shape: MemoryShape, dtype: str, threads: int) -> Memory:
    """Measures a call that is given its output, whose pages were touched before."""
    inputs = tensors.make_inputs(shape, dtype, use_torch=False)
    # NaN both touches the pages before the measurement and cannot be mistaken for a result.
    out = np.full((shape.batch, shape.queries, shape.heads, shape.head_dim_v), np.nan, dtype=inputs.q.dtype)
    subquad.set_num_threads(threads)
    # What the first call of a process loads (code, modules) is not memory of the measured one.
    subquad.attention(*(each[:, :1] for each in inputs), causal=shape.causal)
    with peak_memory() as peak:
        subquad.attention(*inputs, causal=shape.causal, out=out)
    failure = verify.check(shape, dtype, inputs, out, None).failure
    return Memory(peak.bytes, peak.method, failure)


def _backward(shape: BackwardShape, dtype: str, threads: int) -> Memory:
    """Measures forward and backward, which allocate their results.

    Their size is taken off the peak. It is no more than what they take of it, because all of them are there, and
    written, when the last gradient is done, and scratch is kept beyond that.
    """
    inputs = tensors.make_inputs(shape, dtype, use_torch=False)
    do = tensors.make_output_gradient(shape, dtype, use_torch=False)
    subquad.set_num_threads(threads)
    backward_calls.ours(shape, Inputs(*(each[:, :1] for each in inputs)), do[:, :1])()
    call = backward_calls.ours(shape, inputs, do)
    with peak_memory() as peak:
        results = call()
    failure = gradient_check.check(shape, dtype, inputs, do, results, None).failure
    if peak.bytes is None:
        return Memory(None, peak.method, failure)
    lse = shape.batch * shape.heads * shape.queries * max(ITEM_BYTES[dtype], ITEM_BYTES["float32"])
    size = lse + sum(each.nbytes for each in results)
    return Memory(max(peak.bytes - size, 0), peak.method, failure)


def _recurrent(shape: RecurrentShape, dtype: str, threads: int) -> Memory:
    """Measures a recurrent operator, which allocates its results; their size is taken off the peak, as for `_backward`."""
    shape, use_torch = replace(shape, torch_floor={}), shape.form == "training"
    contenders.set_threads(threads, use_torch=use_torch)
    recurrent_calls.make(replace(shape, tokens=(1,)), dtype, use_torch=use_torch).once()
    calls = recurrent_calls.make(shape, dtype, use_torch=use_torch)
    with peak_memory() as peak:
        results = calls.once()
    failure = calls.checked(dtype, results, None).failure
    if peak.bytes is None:
        return Memory(None, peak.method, failure)
    size = sum(each.nbytes for each in results.named().values())
    return Memory(max(peak.bytes - size, 0), peak.method, failure)


def main() -> None:
    """Makes the inputs, measures one call, checks its result."""
    request = json.load(sys.stdin)
    dtype, threads = request["dtype"], request["threads"]
    if request["table"] == "backward":
        memory = _backward(build(BackwardShape, request["shape"]), dtype, threads)
    elif request["table"] == "recurrent":
        memory = _recurrent(build(RecurrentShape, request["shape"]), dtype, threads)
    else:
        memory = _forward(build(MemoryShape, request["shape"]), dtype, threads)
    json.dump(memory._asdict(), sys.stdout)


if __name__ == "__main__":
    main()
