"""What a resumed run still owes the time before its checkpoint: a validation, the end of an epoch, a learning rate."""

from typing import Any

import lightning as L
from lightning.pytorch.loops.evaluation_loop import RestartStage
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau


class Restart:
    """Lets Lightning's loops go on after a micro-batch as if there had been no stop.

    A checkpoint that is written at the end of a micro-batch comes before the validation that is due after it and before
    the end of an epoch whose last one it was. Lightning goes on with the next micro-batch, so that both are lost: the
    best model, early stopping and scores files miss them. In a resumed epoch it steps no ReduceLROnPlateau either,
    because nobody keeps the metric.
    """

    def __init__(self) -> None:
        self._owes = self._rewound = self._owes_plateau = False
        self._metrics: dict[str, Tensor] = {}

    def save(self, trainer: L.Trainer, checkpoint: dict[str, Any], rewound: bool) -> None:
        """Note the metrics, and whether a checkpoint went back to the beginning of its accumulation window."""
        checkpoint["rewound"] = rewound
        checkpoint["metrics"] = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """See where a checkpoint stands, before Lightning's loops read it; its count of ended batches is changed."""
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        counts = progress["current"]
        self._owes = counts["processed"] == counts["completed"] + 1
        self._rewound = checkpoint.get("rewound", False)
        self._metrics = checkpoint.get("metrics", {})
        epochs = loops["epoch_progress"]["current"]
        # Written by a hook of the epoch's end, which comes before the schedules that go by a metric.
        self._owes_plateau = epochs["processed"] == epochs["completed"] + 1
        if self._owes:  # else the fit loop would end the epoch of a last batch by itself, without its hooks
            for counts in (progress["total"], progress["current"]):
                counts["completed"] = counts["processed"]

    def apply(self, trainer: L.Trainer) -> None:
        """Set up what comes first; right before the first batch."""
        loop = trainer.fit_loop.epoch_loop
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if self._owes and due:
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION  # after none of its batches
            loop.val_loop.batch_progress.current.reset()
        elif self._owes:
            loop._batches_that_stepped += 1  # the step of the logs: the batch's own end would have counted it
        elif self._rewound and due:
            loop._batches_that_stepped -= 1  # Lightning passes by a validation that was done, and counts that
        trainer.fit_loop._restarting = False  # nothing but the plateau at the end of this epoch would ask
        trainer.callback_metrics.update(self._metrics)
        for config in trainer.lr_scheduler_configs if self._owes_plateau else ():
            now = config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
            if now and isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor in self._metrics:
                config.scheduler.step(float(self._metrics[config.monitor]))
        self._owes = self._rewound = self._owes_plateau = False
