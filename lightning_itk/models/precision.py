"""What devices can add in."""

import torch

_NO_FP64 = {"mps"}


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type for long sums: fp64, or fp32 on devices that know no fp64 (Apple's)."""
    return torch.float32 if device.type in _NO_FP64 else torch.float64
