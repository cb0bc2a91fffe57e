"""The output layer of a language model, and its logits in fp32."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Head(NamedTuple):
    """An output layer: logits = softcap * tanh(z / softcap) with z = scale * (hidden @ weight.T + bias)."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(head: "Tensor | Head") -> "Head":
        head = head if isinstance(head, Head) else Head(head)
        if head.weight.ndim != 2:
            raise ValueError(f"a head must be [vocab, hidden], got {list(head.weight.shape)}")
        return head

    def detach(self) -> "Head":
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def to(self, device: torch.device) -> "Head":
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def cut(self, vocab: int) -> "Head":
        """The same head for the first `vocab` tokens."""
        if vocab == self.weight.shape[0]:
            return self
        return self._replace(weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab])

    def prepared(self, hidden: Tensor, dtype: torch.dtype | None = None) -> "Head":
        """The detached head in the dtype its matrix product will use for inputs like `hidden`, or in this one."""
        head, dtype = self.detach(), dtype or matmul_dtype(hidden, self.weight)
        return head._replace(weight=head.weight.to(dtype))


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a head multiplies in, as autocast is now."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    # Only CUDA multiplies half-precision inputs into fp32 outputs; elsewhere the inputs are widened.
    return dtype if dtype == torch.float64 or device == "cuda" else torch.float32


def project(hidden: Float[Tensor, "n H"], head: Head) -> Float[Tensor, "n V"]:
    """Logits in fp32 (fp64 for fp64 inputs) of a `prepared` head."""
    return shape_logits(product(hidden, head.weight), head)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    hidden = hidden.to(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return torch.mm(hidden, weight.t())


def shape_logits(logits: Tensor, head: Head) -> Tensor:
    """In place."""
    if head.bias is not None:
        logits += head.bias.to(logits.dtype)
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def unshape_gradient(gradient: Tensor, logits: Tensor, head: Head) -> Tensor:
    """The gradient by `hidden @ weight.T + bias` from the one by the logits, in place."""
    if head.softcap is not None:
        gradient *= 1 - (logits / head.softcap).square_()
    return gradient.mul_(head.scale) if head.scale != 1.0 else gradient
