"""What devices can add in, and what a model keeps its weights in."""

import torch
from torch.distributed.fsdp import FSDPModule

_NO_FP64 = {"mps"}


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type for long sums: fp64, or fp32 on devices that know no fp64 (Apple's)."""
    return torch.float32 if device.type in _NO_FP64 else torch.float64


def reshard(model: torch.nn.Module) -> None:
    """Let a model under FSDP2 show the weights that it keeps: after a validation its root still has the whole ones, in
    the dtype it computes in. On all ranks or one; nothing is sent."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
