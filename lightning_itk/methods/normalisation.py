"""Exact token normalisation: what a step sums up over its micro-batches and ranks, and the gradients divided by it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Losses are sums. Backward sees them times this constant, which keeps fp16 gradients in range and, being a power of
# two, rounds nothing; the gradients are divided by the true token count just before the optimizer looks at them.
LOSS_SCALE = 2.0**-10


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
        """Add a micro-batch, without waiting for the device. The names are the same on every rank."""
        if self._reduced is not None:
            self._own, self._reduced, self._micro_batches = {}, None, 0
        self._micro_batches += 1
        for name, value in sums.items():
            if isinstance(value, Tensor):
                added = value.detach().double().to(device, non_blocking=True)
            else:
                added = torch.full((), value, dtype=torch.float64, device=device)  # a copy from the host would wait
            self._own[name] = self._own[name] + added if name in self._own else added

    def reduced(self, strategy: Any) -> dict[str, Tensor]:
        """The sums over all ranks, fp64 scalars; nothing where nothing was added. A collective, once per step."""
        if self._reduced is None:
            names = sorted(self._own)
            total = strategy.reduce(torch.stack([self._own[n] for n in names]), reduce_op="sum") if names else ()
            self._reduced = dict(zip(names, total, strict=True))
        return self._reduced


def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply all gradients by a number on their device: rounded to fp32, or exact for fp64 gradients."""
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    for wide in (False, True):
        chosen = [gradient for gradient in gradients if (gradient.dtype == torch.float64) == wide]
        if chosen:
            torch._foreach_mul_(chosen, factor if wide else factor.float())
