"""Products of half-precision matrices that are summed in fp32, by whatever this build of torch has for it."""

import functools

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, out: Tensor, unit: float = 1.0, accumulate: bool = False, wide: bool = False) -> None:
    """out = unit · (a @ b), or out += a @ b into fp32; summed in fp32.

    `wide` makes an fp32 product and rounds it once: where the sum is as long as the vocabulary, cuBLAS may split it and
    add the parts in bf16 (torch's `allow_bf16_reduced_precision_reduction`, on by default).
    """
    if (unit != 1.0 or wide) and out.dtype != torch.float32:
        product = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        matmul(a, b, product)
        out.copy_(product if unit == 1.0 else product.mul_(unit))
    elif a.dtype == out.dtype and (a.is_cuda or a.dtype == torch.float32):
        _ = torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and a.is_cuda and widens(a.device, a.dtype, accumulate):
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif accumulate:
        out.addmm_(a.float(), b.float())
    else:
        out.copy_(a.float() @ b.float())
    if unit != 1.0 and out.dtype == torch.float32:
        out.mul_(unit)


@functools.cache
def widens(device: torch.device, dtype: torch.dtype, accumulate: bool) -> bool:
    """Whether this build multiplies `dtype` into fp32 (cuBLAS does; probed once with 16 x 16 matrices)."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        if accumulate:
            torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, a, out_dtype=torch.float32, out=out)
    except (NotImplementedError, RuntimeError):
        return False
    return True
