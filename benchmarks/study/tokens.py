"""A callback that counts what a run learned from."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_itk.batch import count_targets


class ResponseTokens(Callback):
    """Write the number of response tokens that training saw to a file when it ends.

    Args:
        path: where.
    """

    def __init__(self, path: str) -> None:
        self.path, self.total = path, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.total += int(count_targets(batch))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Path(self.path).write_text(f"{self.total}\n")
