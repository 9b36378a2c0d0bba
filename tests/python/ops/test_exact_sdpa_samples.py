"""The sample inputs that PyTorch tests its own function with."""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from subquad import scaled_dot_product_attention

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
(OPERATOR,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def samples(dtype):
    """Returns the samples with and without dropout."""
    torch.manual_seed(0)
    both = list(OPERATOR.sample_inputs("cpu", dtype, requires_grad=False))
    dropout = [sample for sample in both if sample.kwargs.get("dropout_p", 0.0) > 0]
    return [sample for sample in both if sample not in dropout], dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype, check_sdpa):
    plain, _ = samples(dtype)
    assert len(plain) >= 10
    forms = {(s.input.dim(), s.kwargs.get("is_causal"), "attn_mask" in s.kwargs) for s in plain}
    assert len(forms) >= 4
    for sample in plain:
        options = {name: value for name, value in sample.kwargs.items() if name != "dropout_p"}
        check_sdpa(sample.input, *sample.args, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_with_dropout(dtype):
    _, dropout = samples(dtype)
    assert len(dropout) >= 10

    def run(sample, seed):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs).double()

    for sample in dropout:
        assert torch.equal(run(sample, 1), run(sample, 1))
        runs = torch.stack([run(sample, seed) for seed in range(100)])
        expected = scaled_dot_product_attention(
            sample.input, *sample.args, **{**sample.kwargs, "dropout_p": 0.0}
        )
        # The mean over draws is the output without dropout: within five standard errors, and the rounding of half types.
        error = runs.std(0) / 10
        assert (error > 0).any()
        assert ((runs.mean(0) - expected).abs() <= 5 * error + 1e-2).all()
