"""What needs PyTorch: `override_sdpa`, for models that call PyTorch's attention function themselves.

Gradients, `torch.compile` and autocast need no import: the functions of `subquad` find what is here when a call needs it.
"""

from subquad.torch.override import Override, Report, override_sdpa

__all__ = ["Override", "Report", "override_sdpa"]
