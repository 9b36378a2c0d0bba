"""Gradients of packed sequences are those of each sequence alone."""

import numpy as np
import pytest
import torch

import subquad

LENGTHS = {
    "even": ([16, 16], [16, 16]),
    "uneven": ([1, 63, 100, 0, 7], [1, 64, 130, 5, 0]),
    "more queries": ([70], [9]),
    "none": ([], []),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 3)},
    "soft-cap": {"causal": True, "softcap": 2.0},
    "scale": {"softmax_scale": 0.3},
}


def _starts(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def _inputs(lengths, dtype, heads=(4, 2), dims=(24, 40)):
    generator = torch.Generator().manual_seed(1)
    queries, keys = map(sum, lengths)

    def new(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = new(queries, heads[0], dims[0]), new(keys, heads[1], dims[0]), new(keys, heads[1], dims[1])
    return q, k, v, new(queries, heads[0], dims[1]), new(heads[0], queries, dtype=wide)


def _separately(call, lengths, inputs, options, dlse):
    """Returns the gradients of all sequences, each from a call of its own."""
    q, k, v, do = inputs
    options = dict(options)
    if "softmax_scale" in options:
        options["scale"] = options.pop("softmax_scale")
    grads, q_at, k_at = [], 0, 0
    for queries, keys in zip(*lengths, strict=True):
        rows, columns = slice(q_at, q_at + queries), slice(k_at, k_at + keys)
        part = [x[None, s] for x, s in zip((q, k, v), (rows, columns, columns), strict=True)]
        out, lse = subquad.attention(*part, return_lse=True, **options)
        grads.append(call(do[None, rows], *part, out, lse, dlse=dlse[None, :, rows], **options))
        q_at, k_at = q_at + queries, k_at + keys
    return [torch.cat([grad[0] for grad in parts]) for parts in zip(*grads, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_as_separate_calls(lengths, options, dtype):
    q, k, v, do, dlse = _inputs(lengths, dtype)
    starts = [_starts(part) for part in lengths]
    out, lse = subquad.attention_varlen(q, k, v, *starts, return_lse=True, **options)
    got = subquad.attention_varlen_backward(do, q, k, v, out, lse, *starts, dlse=dlse, **options)
    assert [grad.shape for grad in got] == [q.shape, k.shape, v.shape]
    if not lengths[0]:
        return
    expected = _separately(subquad.attention_backward, lengths, (q, k, v, do), options, dlse)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for grad, want in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)


def test_slopes_and_sinks():
    lengths = LENGTHS["uneven"]
    q, k, v, do, _ = _inputs(lengths, torch.float64)
    starts = [_starts(part) for part in lengths]
    slopes = torch.linspace(0.1, 0.5, 5 * 4, dtype=torch.float64).reshape(5, 4)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def loss(slopes, sinks):
        out = subquad.attention_varlen(q, k, v, *starts, alibi_slopes=slopes, sinks=sinks, causal=True)
        return float((out * do).sum())

    options = {"alibi_slopes": slopes, "sinks": sinks, "causal": True}
    out, lse = subquad.attention_varlen(q, k, v, *starts, return_lse=True, **options)
    names = ("sinks", "alibi_slopes")
    of_sinks, of_slopes = subquad.attention_varlen_backward(
        do, q, k, v, out, lse, *starts, wrt=names, **options
    )
    step = 1e-6
    for place in np.ndindex(5, 4):
        change = torch.zeros_like(slopes)
        change[place] = step
        difference = (loss(slopes + change, sinks) - loss(slopes - change, sinks)) / (2 * step)
        assert float(of_slopes[place]) == pytest.approx(difference, rel=1e-6, abs=1e-7)
    for head in range(4):
        change = torch.zeros_like(sinks)
        change[head] = step
        difference = (loss(slopes, sinks + change) - loss(slopes, sinks - change)) / (2 * step)
        assert float(of_sinks[head]) == pytest.approx(difference, rel=1e-6, abs=1e-7)


def test_numpy():
    lengths = LENGTHS["uneven"]
    tensors = _inputs(lengths, torch.float32)
    q, k, v, do, dlse = (tensor.numpy() for tensor in tensors)
    starts = [_starts(part).numpy() for part in lengths]
    out, lse = subquad.attention_varlen(q, k, v, *starts, return_lse=True)
    got = subquad.attention_varlen_backward(do, q, k, v, out, lse, *starts, dlse=dlse)
    assert all(isinstance(grad, np.ndarray) and np.isfinite(grad).all() for grad in got)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("lse", lambda x: x[:, 1:], ValueError, r"lse: .*\(4, 171\)"),
        ("do", lambda x: x.double(), TypeError, "do: .*float64"),
        ("out", lambda x: x[..., :1], ValueError, "out: "),
    ],
)
def test_refused(name, change, error, message):
    lengths = LENGTHS["uneven"]
    q, k, v, do, _ = _inputs(lengths, torch.float32)
    starts = [_starts(part) for part in lengths]
    out, lse = subquad.attention_varlen(q, k, v, *starts, return_lse=True)
    results = {"do": do, "out": out, "lse": lse}
    results[name] = change(results[name])
    with pytest.raises(error, match=message):
        subquad.attention_varlen_backward(results["do"], q, k, v, results["out"], results["lse"], *starts)


def test_biases_are_no_arguments_of_packed_sequences():
    lengths = LENGTHS["even"]
    q, k, v, do, _ = _inputs(lengths, torch.float32)
    starts = [_starts(part) for part in lengths]
    out, lse = subquad.attention_varlen(q, k, v, *starts, return_lse=True)
    with pytest.raises(ValueError, match='wrt: expected names of q, k, v, alibi_slopes, sinks, got "bias"'):
        subquad.attention_varlen_backward(do, q, k, v, out, lse, *starts, wrt=["bias"])
