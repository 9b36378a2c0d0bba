"""What importing subquad does, and what it leaves alone."""

import pytest

OPTIONAL = ("torch", "transformers", "jax", "ml_dtypes", "timm", "rich", "accelerate", "gguf")

# A finder that knows none of them, as where they are not installed.
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

USE = """
import numpy as np
import subquad, subquad.reference, subquad.testing

q = np.random.default_rng(0).standard_normal((1, 5, 2, 8)).astype(np.float32)
out, lse = subquad.attention(q, q, q, causal=True, return_lse=True)
expected, expected_lse = subquad.reference.attention(q, q, q, causal=True, return_lse=True)
naive, naive_lse = subquad.testing.naive_attention(q, q, q, dtype="float32", causal=True)
subquad.testing.assert_close(out, expected, naive=naive)
subquad.testing.assert_close(lse, expected_lse, naive=naive_lse)
mask = subquad.masks.chunked(2) & subquad.masks.causal()
masked = subquad.attention(q, q, q, mask=mask, normalizer=subquad.normalizers.ReLU())
assert masked.shape == q.shape
sdpa = subquad.scaled_dot_product_attention(q, q, q)
assert sdpa.dtype == np.float32 and sdpa.shape == q.shape
"""


def test_importing_imports_no_library(run_python):
    code = f"""
import sys
before = set(sys.modules)
import subquad
roots = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(root for root in roots if root not in sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name in {OPTIONAL!r}))
"""
    assert [line.split() for line in run_python(code).splitlines()] == [["subquad"], []]


def test_descriptions_are_imported_when_they_are_used(run_python):
    code = """
import sys
import subquad
names = ["biases", "flash_attn", "masks", "normalizers"]
print([name for name in names if f"subquad.{name}" in sys.modules], set(names) <= set(dir(subquad)))
print(subquad.masks.causal(), subquad.normalizers.ReLU(), subquad.biases.__name__, subquad.flash_attn.__name__)
try:
    subquad.nothing
except AttributeError as error:
    print(error)
"""
    assert run_python(code).splitlines() == [
        "[] True",
        "causal() ReLU(power=1.0, normalize=True) subquad.biases subquad.flash_attn",
        "module 'subquad' has no attribute 'nothing'",
    ]


def test_using_imports_no_library_that_was_not_there(run_python):
    code = USE + f"\nimport sys\nprint([name for name in {OPTIONAL!r} if name in sys.modules])"
    assert run_python(code) == "[]\n"


def test_everything_works_without_other_libraries(run_python):
    code = (
        BLOCK
        + USE
        + """
subquad.show_config()
class Only:
    def __dlpack__(self, **options):
        return q.__dlpack__(**options)
    def __dlpack_device__(self):
        return q.__dlpack_device__()
print(np.array_equal(subquad.attention(Only(), Only(), Only(), causal=True), out))
"""
    )
    assert run_python(code).endswith("True\n")


@pytest.mark.parametrize("module", ["torch", "hf"])
def test_optional_parts_say_what_is_missing(module, run_python):
    code = (
        BLOCK
        + f"""
try:
    import subquad.{module}
except ModuleNotFoundError as error:
    print(error.name)
import subquad
print(subquad.__version__)
"""
    )
    assert run_python(code).splitlines()[0] in OPTIONAL


def test_importing_patches_nothing(run_python):
    code = """
import torch
import torch.nn.functional as F
def everything():
    modules = [torch, F, torch.nn, torch._C._nn, torch.Tensor, torch.nn.MultiheadAttention]
    return {(module.__name__, name): id(value) for module in modules for name, value in vars(module).items()}
before = everything()
import subquad, subquad.testing, subquad.torch
after = everything()
print({name for name in before if after.get(name) != before[name]}, set(after) - set(before))
"""
    assert run_python(code) == "set() set()\n"


def test_bfloat16_of_numpy_needs_ml_dtypes_only_where_it_is_used(run_python):
    code = """
import sys
import numpy as np
import subquad
q = np.ones((1, 2, 1, 4), np.float16)
subquad.attention(q, q, q)
assert "ml_dtypes" not in sys.modules
import ml_dtypes
print(subquad.attention(*[q.astype(ml_dtypes.bfloat16)] * 3).dtype)
"""
    assert run_python(code) == "bfloat16\n"


def test_torch_may_be_imported_later(run_python):
    code = """
import sys
import numpy as np
import subquad
q = np.ones((1, 2, 1, 4))
subquad.attention(q, q, q)
import torch
print(type(subquad.attention(*[torch.from_numpy(q)] * 3)).__name__)
print([name for name in sys.modules if name.startswith(("subquad.torch", "subquad.hf", "subquad.cli"))])
"""
    assert run_python(code) == "Tensor\n[]\n"
