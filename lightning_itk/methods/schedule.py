"""Learning-rate schedules as Lightning takes them: by a name of transformers, or built by the user."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable
from transformers import get_scheduler


def schedule(
    given: LRSchedulerCallable | str, optimizer: torch.optim.Optimizer, trainer: L.Trainer, warmup: float
) -> dict[str, Any]:
    """A schedule that is stepped once per optimizer step; ReduceLROnPlateau once per epoch, by its monitor or val/loss.

    Args:
        given: a schedule name of transformers, or a builder that takes the optimizer.
        warmup: share of all steps (below 1) or number of steps (1 and more), for a named schedule.
    """
    if isinstance(given, str):
        steps = int(trainer.estimated_stepping_batches)
        warmup_steps = int(warmup if warmup >= 1 else warmup * steps)
        named = get_scheduler(given, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
        return {"scheduler": named, "interval": "step"}
    built = given(optimizer)
    if isinstance(built, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return {"scheduler": built, "interval": "epoch", "monitor": getattr(built, "monitor", "val/loss")}
    return {"scheduler": built, "interval": "step"}
