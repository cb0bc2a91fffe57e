"""Which implementation of a loss runs: Triton where it can, torch elsewhere, and never a silent substitute."""

from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "triton"]


def resolve_impl(impl: Impl, tensor: Tensor, kind: str | None = None) -> Literal["torch", "triton"]:
    """Which implementation runs for tensors like this one, and for a divergence of this kind.

    Raises:
        RuntimeError: `impl="triton"` where Triton cannot run; the message says why.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    if impl == "torch" or (impl == "auto" and tensor.device.type != "cuda"):
        return "torch"
    try:
        from lightning_itk.kernels.launch import KINDS, supported
    except ImportError as error:
        reason: str | None = f"triton cannot be imported ({error})"
    else:
        reason = supported(tensor.device)
        if tensor.dtype == torch.float64:
            reason = "the kernels compute in fp32 and would lose fp64 precision"
        if kind is not None and kind not in KINDS:
            reason = f"the kernels know no divergence of the kind {kind!r}"
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run here: {reason}")
    return "torch"
