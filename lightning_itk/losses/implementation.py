"""Which implementation of a loss runs: Triton where it can, torch elsewhere, and never a silent substitute."""

from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "triton"]


def resolve_impl(
    impl: Impl, tensor: Tensor, kind: str | None = None, head_dim: int | None = None
) -> Literal["torch", "triton"]:
    """Which implementation runs for tensors like this one, and for a divergence of this kind.

    Args:
        head_dim: of an attention loss, the larger head dimension of both models.

    Raises:
        RuntimeError: `impl="triton"` where Triton cannot run; the message says why.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    if impl == "torch" or (impl == "auto" and tensor.device.type != "cuda"):
        return "torch"
    reason = _refusal(tensor, kind, head_dim)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run here: {reason}")
    return "torch"


def describe_impl(impl: Impl, tensor: Tensor, kind: str | None = None, head_dim: int | None = None) -> str:
    """What `resolve_impl` chooses, in words, and on a GPU why it is not Triton.

    Args:
        kind: of the token loss.
        head_dim: of the attention loss, which is named where it runs otherwise than the token loss; None = none.

    Raises:
        RuntimeError: as `resolve_impl`.
    """

    def choice(**how: str | int | None) -> str:
        name = resolve_impl(impl, tensor, **how)  # type: ignore[arg-type]
        unexpected = name == "torch" and impl == "auto" and tensor.device.type == "cuda"
        return f"{name}, {_refusal(tensor, **how)}" if unexpected else name  # type: ignore[arg-type]

    token = choice(kind=kind)
    attention = token if head_dim is None else choice(head_dim=head_dim)
    name, _, reason = token.partition(", ")
    text = f"{name} (impl={impl}) on {tensor.device}" + (f", {reason}" if reason else "")
    return text if attention == token else f"{text}; attention: {attention}"


def _refusal(tensor: Tensor, kind: str | None = None, head_dim: int | None = None) -> str | None:
    """Why Triton cannot serve tensors like this one; None where it can."""
    try:
        from lightning_itk.kernels.launch import KINDS, attention_refusal, supported
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if kind is not None and kind not in KINDS:
        return f"the kernels know no divergence of the kind {kind!r}"
    if tensor.dtype == torch.float64:
        return "the kernels compute in fp32 and would lose fp64 precision"
    return supported(tensor.device) if head_dim is None else attention_refusal(tensor.device, head_dim)
