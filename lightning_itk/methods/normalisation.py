"""Exact token normalisation: what a step sums up over its micro-batches and ranks, and the gradients divided by it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_itk.models.precision import sum_dtype

_SCALE = 2.0**-10


def loss_scale(parameters: Iterable[Tensor], targets: Tensor, strategy: Any) -> float:
    """What the sums of losses are multiplied by on their way to backward; the gradients are divided by it and by the
    true token count just before the optimizer looks at them. A power of two rounds nothing.

    It keeps gradients in range. Where they are fp16 themselves, without a GradScaler's fp32 weights, that range is
    narrow: there it makes a mean of the first micro-batch's sums, as other trainers train on. A collective then, and
    the host waits for the device; once in a run.

    Args:
        parameters: of the module.
        targets: predicted tokens of the first micro-batch, a scalar.
        strategy: what reduces over the ranks.
    """
    if not any(p.requires_grad and p.dtype == torch.float16 for p in parameters):
        return _SCALE
    count = float(strategy.reduce(targets.detach().float(), reduce_op="mean"))
    return 2.0 ** -round(math.log2(max(count, 1.0)))


class StepSums:
    """Named sums over the micro-batches of an optimizer step.

    A step ends when its sums are reduced over the ranks; the next `add` begins another. So several optimizers that
    step after one backward see the same step, and each evaluation of a closure is a step of its own.
    """

    def __init__(self) -> None:
        self._own: dict[str, Tensor] = {}
        self._reduced: dict[str, Tensor] | None = None
        self._micro_batches = 0

    @property
    def begun(self) -> int:
        """Micro-batches of a step that has not ended."""
        return 0 if self._reduced is not None else self._micro_batches

    def add(self, sums: Mapping[str, Tensor | int], device: torch.device) -> None:
        """Add a micro-batch, without waiting for the device. Names and shapes are the same on every rank."""
        if self._reduced is not None:
            self._own, self._reduced, self._micro_batches = {}, None, 0
        self._micro_batches += 1
        for name, value in sums.items():
            if isinstance(value, Tensor):
                added = value.detach().to(device, sum_dtype(device), non_blocking=True)
            else:
                added = torch.full((), value, dtype=sum_dtype(device), device=device)  # a copy from the host would wait
            self._own[name] = self._own[name] + added if name in self._own else added

    def reduced(self, strategy: Any) -> dict[str, Tensor]:
        """The sums over all ranks; nothing where nothing was added. A collective, once per step."""
        if self._reduced is None:
            own = [self._own[name] for name in sorted(self._own)]
            total = strategy.reduce(torch.cat([t.flatten() for t in own]), reduce_op="sum") if own else torch.empty(0)
            parts = total.split([t.numel() for t in own])
            self._reduced = {n: part.view_as(self._own[n]) for n, part in zip(sorted(self._own), parts, strict=True)}
        return self._reduced


def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply all gradients by a number on their device: rounded to fp32, or exact for fp64 gradients."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    for wide in (False, True):
        chosen = [gradient for gradient in gradients if (gradient.dtype == torch.float64) == wide]
        if chosen:
            torch._foreach_mul_(chosen, factor if wide else factor.float())
