"""What needs PyTorch: `override_sdpa`, for models that call PyTorch's attention function themselves."""

from subquad.torch.override import Override, Report, override_sdpa

__all__ = ["Override", "Report", "override_sdpa"]
