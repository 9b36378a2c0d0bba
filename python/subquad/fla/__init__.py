"""flash-linear-attention on CPUs: `install` makes `fla.ops.<family>.<name>` resolve to `subquad.ops.<name>` for CPU tensors.

Where flash-linear-attention can be imported, its operators and short convolutions that `subquad.ops` has, and the norms,
activations and embeddings of its layers (in plain PyTorch), are computed here when all tensors of a call lie on the CPU; any other
call, and every other function, is its own. So its layers and models (`fla.layers`, `fla.models`) run on a CPU, in training too.

Where it is not installed, or cannot be imported because Triton is not, `fla.ops` and the modules of its families that
`subquad.ops` has are made, with these functions in them, for code that imports operators by those names. Other modules of `fla`
are not there, and a name that `subquad.ops` does not have raises `AttributeError` (`ImportError` in `from ... import`).

Functions that other code has bound before `install` stay what they are, unless flash-linear-attention looks for backends at each
call of them, as it does for `chunk_gated_delta_rule`, `chunk_kda` and the activations that layers are built with. Code that imports
operators by name, such as transformers' models, is best imported after `install`.
"""

from .installation import install, uninstall

__all__ = ["install", "uninstall"]
