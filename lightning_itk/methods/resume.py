"""What lets a run continue to the bit: checkpoints between two steps, with the random state of every rank."""

from typing import Any

import lightning as L
from torch import Tensor

from lightning_itk.methods.restart import Restart
from lightning_itk.models.checkpoint import rng_state, rng_states, set_rng_state
from lightning_itk.position import regroup, rewind
from lightning_itk.trainer import datamodule, replica


class ResumePoint:
    """The random states of a run, and what is added to its checkpoints and taken from the one that it resumes."""

    def __init__(self) -> None:
        self._window: dict[str, Tensor] = {}
        self._loaded: list[dict[str, Tensor]] | None = None
        self._restart = Restart()

    def begin_window(self) -> None:
        """Remember where an accumulation window began: a checkpoint within it goes back there."""
        self._window = rng_state()

    def save(self, trainer: L.Trainer, checkpoint: dict[str, Any], begun: int) -> None:
        """Complete a checkpoint; begun: micro-batches since the last step."""
        checkpoint["rng_states"] = rng_states(self._window if begun else rng_state(), trainer.world_size)
        if begun:
            rewind(checkpoint, begun)
        self._restart.save(trainer, checkpoint, rewound=begun > 0)

    def load(self, trainer: L.Trainer | None, checkpoint: dict[str, Any]) -> None:
        """Note the random states; count batches as this run does.

        Raises:
            ValueError: the checkpoint stands in the middle of an epoch whose steps have other rows than this run's.
        """
        self._loaded = checkpoint.get("rng_states")
        if trainer is None or trainer.state.fn != "fit":
            return
        self._restart.load(checkpoint)
        if size := datamodule(trainer).batch_size:
            accumulate, ranks = trainer.accumulate_grad_batches, replica(trainer).total
            regroup(checkpoint, batch_size=size, accumulate=accumulate, ranks=ranks)

    def restore(self, trainer: L.Trainer) -> None:
        """Go on from there; right before the first batch."""
        if self._loaded is None:
            return
        set_rng_state(self._loaded, trainer.global_rank)
        self._loaded = None
        self._restart.apply(trainer)
        for callback in trainer.checkpoint_callbacks:
            # Lightning forgets which step it saved last and would save it again after the next micro-batch: a
            # checkpoint inside an accumulation window, whose gradients nobody has.
            callback._last_global_step_saved = trainer.global_step  # type: ignore[attr-defined]
