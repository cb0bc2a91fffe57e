"""The linear losses in chunks of tokens: GEMMs into fp32 logits, the row kernel, GEMMs of the gradients.

`chunks.py` says how many tokens go together; where the bytes go is in README.md.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .chunks import plan_chunks
from .gemm import matmul
from .rows import token_loss

_BLOCK = 1 << 24  # elements that are scaled at a time
Head = tuple[Tensor, Tensor, Tensor | None]  # hidden [N, H], weight [V, H], bias [V]


def losses_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    options: dict[str, Any],
    ce_weight: float,
    kl_weight: float,
    wanted: tuple[bool, bool, bool],
    max_scratch_bytes: int,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Cross-entropy [N], T² · KL [N], and the gradients of `empty_gradients`. With none wanted, only the losses."""
    hidden, weight, bias = student
    want_hidden, want_weight, want_bias = wanted
    gradients = d_hidden, d_weight, d_bias = empty_gradients(hidden, weight, bias, *wanted)
    (n, width), v, item = hidden.shape, options["v"], hidden.element_size()
    if n == 0:
        d_weight.zero_()
        return d_bias.new_empty(0), d_bias.new_empty(0), gradients
    rows, columns, kept = plan_chunks(
        n,
        v,
        width,
        item,
        teacher=teacher is not None,
        trains_head=want_weight,
        max_scratch_bytes=max_scratch_bytes,
        gradients=any(wanted),
    )
    # fp16 loses dlogits below 6e-8, so they are stored in units that put the largest near 1000.
    unit = 1.0
    if hidden.dtype == torch.float16:
        largest = max(abs(kl_weight) * options["temperature"], abs(ce_weight)) * abs(options["student_scale"])
        unit = largest / 1024 or 1.0
    empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    heads = (student,) if teacher is None else (student, teacher)
    logits = [empty(rows, columns) for _ in heads]
    dlogits = empty(kept, columns, dtype=hidden.dtype) if any(wanted) else None
    accumulator = empty(v, width) if want_weight and kept < n else None
    ce, kl = empty(n), empty(n)

    for first in range(0, n, kept):
        group = slice(first, min(first + kept, n))
        for start in range(group.start, group.stop, rows):
            chunk = slice(start, min(start + rows, group.stop))
            size = chunk.stop - start
            for (x, w, _), z in zip(heads, logits, strict=True):
                matmul(x[chunk], w[:v].t(), z[:size, :v])
            token_loss(
                logits[0][:size],
                None if teacher is None else logits[1][:size],
                None if labels is None else labels[chunk],
                student_bias=bias,
                teacher_bias=None if teacher is None else teacher[2],
                kl_weight=kl_weight / unit,
                ce_weight=ce_weight / unit,
                kl=None if teacher is None else kl[chunk],
                ce=None if labels is None else ce[chunk],
                grad=None if dlogits is None else dlogits[start - first : chunk.stop - first],
                readable=columns,
                **options,
            )
        if dlogits is None:
            continue
        dz = dlogits[: group.stop - first, :v]
        if want_bias:
            d_bias[:v] += dz.sum(0, dtype=torch.float32)
        if want_hidden:
            matmul(dz, weight[:v], d_hidden[group], unit, wide=True)
        if accumulator is not None:
            matmul(dz.t(), hidden[group], accumulator, accumulate=first > 0)
        elif want_weight:
            matmul(dz.t(), hidden, d_weight[:v], unit)

    if accumulator is not None:
        d_weight[:v] = accumulator if unit == 1 else accumulator.mul_(unit)
    d_weight[v:].zero_()
    d_bias *= unit
    return ce, kl, gradients


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Storage for the gradients by hidden [N, H], weight [V, H] and bias [V], of no elements where not wanted."""
    exact = torch.float32 if weight.dtype == torch.float16 else weight.dtype  # sums over tokens overflow fp16
    d_hidden = torch.empty(hidden.shape if want_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.empty(weight.shape if want_weight else (0,), dtype=exact, device=hidden.device)
    d_bias = torch.zeros(weight.shape[0] if want_bias else 0, dtype=torch.float32, device=hidden.device)
    return d_hidden, d_weight, d_bias


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad · factor in the place of grad, rounded once: `mul_` would first round an fp32 factor to half precision.

    A compiler's graphs are functions: in them the product is a tensor of its own, whose place the compiler chooses.
    """
    if isinstance(grad, FunctionalTensor):
        return grad * factor if grad.element_size() > 2 else (grad.float() * factor).to(grad.dtype)
    if grad.element_size() > 2:
        return grad.mul_(factor)
    for block in grad.split(max(1, _BLOCK // max(1, grad[:1].numel()))):  # an fp32 copy of all of it does not fit
        block.copy_(block.float() * factor)
    return grad
