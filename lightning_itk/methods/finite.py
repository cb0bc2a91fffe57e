"""No number that is not finite reaches the weights: such a step stops the run, or is left out and counted."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_itk.batch import Batch
from lightning_itk.models.precision import sum_dtype

NonFinite = Literal["stop", "skip"]
_NAMED = 8  # samples in an error message
_KEPT = 64  # micro-batches whose sample ids wait on the device to be looked at


class _Step(NamedTuple):
    number: int
    values: dict[str, Tensor]  # by name, the terms' sums and the gradient's norm
    batches: list[tuple[Tensor, Tensor]]  # by micro-batch of this rank: sample ids, loss


class FiniteGuard:
    """Looks at the loss terms and gradients of every optimizer step, just before the optimizer does.

    On a GPU `stop` does not wait for the device: the gradients of such a step become 0 there, and the run stops when it
    next logs or saves, after 64 micro-batches at the latest. `skip` waits once per step, because a step without
    gradients must be decided on the host.

    Args:
        mode: stop = an error that says where; skip = leave the step out and count it in `skipped`.
    """

    def __init__(self, mode: NonFinite) -> None:
        if mode not in ("stop", "skip"):
            raise ValueError(f"nonfinite must be 'stop' or 'skip', got {mode!r}")
        self.mode, self.skipped = mode, 0
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._looked = False
        self._unchecked: list[_Step] = []

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Note a micro-batch of the step."""
        if self._looked:
            self._batches, self._looked = [], False
        self._batches.append((batch["sample_ids"], loss.detach()))

    def norm(self, trainer: L.Trainer, parameters: Sequence[Tensor], sums: Mapping[str, Tensor]) -> Tensor:
        """The norm of all gradients, after those of a step that is not finite were taken away.

        Raises:
            ValueError: such a step, in the mode stop; its terms, samples and the checkpoint to go back to.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._looked = True
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return norm  # a GradScaler meets infinite gradients on purpose and leaves such steps out itself
        terms = {name: value for name, value in sums.items() if name.startswith("train/")}
        step = _Step(trainer.global_step, {**terms, "the gradient": norm}, self._batches)
        finite = _finite(step)
        if self.mode == "skip":
            if not finite:
                self.skipped += 1
                for parameter in parameters:
                    parameter.grad = None
        elif norm.device.type == "cpu":
            self._stop_unless_finite(trainer, step)
        else:
            for gradient in gradients:
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.masked_fill_(~finite, 0)
            self._unchecked.append(step)
            if sum(len(step.batches) for step in self._unchecked) >= _KEPT:
                self.check(trainer)
        return norm

    def check(self, trainer: L.Trainer) -> None:
        """Look at the steps since the last time; waits for a GPU, so ask where something else does too."""
        unchecked, self._unchecked = self._unchecked, []
        for step in unchecked:
            self._stop_unless_finite(trainer, step)

    def _stop_unless_finite(self, trainer: L.Trainer, step: _Step) -> None:
        if _finite(step):
            return
        wrong = {name: float(value) for name, value in step.values.items() if not value.isfinite()}
        terms = [f"{name} is {value}" for name, value in wrong.items() if name != "train/loss"]
        at_fault = [ids for ids, loss in step.batches if not loss.isfinite()]
        if "train/loss" not in wrong:  # a gradient of its own does not say whose it is
            at_fault = [ids for ids, _ in step.batches]
        raise ValueError(
            f"step {step.number}: {', '.join(terms)}; {_samples(at_fault)}. No such number reached the weights. "
            f"Go back to {_last_saved(trainer)}, or set nonfinite: skip"
        )


def _samples(batches: list[Tensor]) -> str:
    if not batches:
        return "samples of another rank"
    ids = torch.cat([ids.flatten() for ids in batches]).unique()
    named = ids[ids >= 0].tolist()
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"samples {', '.join(map(str, named[:_NAMED]))}{more}"


def _finite(step: _Step) -> Tensor:
    return torch.stack([value.to(sum_dtype(value.device)) for value in step.values.values()]).isfinite().all()


def _last_saved(trainer: L.Trainer) -> str:
    saved: list[Any] = [getattr(callback, "_last_checkpoint_saved", "") for callback in trainer.checkpoint_callbacks]
    return next((str(path) for path in reversed(saved) if path), "the beginning (no checkpoint was saved)")
