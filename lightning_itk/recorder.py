"""ResponseLossRecorder: what the model makes of every training sample, before training and after each epoch."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor

from lightning_itk.batch import response_rows
from lightning_itk.losses.chunked import linear_token_scores
from lightning_itk.methods.module import InstructionModule
from lightning_itk.models.hidden import base_causal_lm, hidden_states
from lightning_itk.models.precision import sum_dtype
from lightning_itk.outputs import check_output
from lightning_itk.selection.scores import append_epoch, read_meta, write_scores
from lightning_itk.trainer import datamodule, log_folder


class ResponseLossRecorder(Callback):
    """Record every training sample's mean response loss to a Parquet file: the input of learning percentage.

    Scores are taken before training and after each epoch, of the samples that the data module would train on without
    a subset, each exactly once whatever the number of ranks. The file is replaced only by a complete one; a resumed
    run does not score an epoch twice. A file that stands there already is refused when training starts.

    Args:
        path: The scores file; null = `scores.parquet` in the logger's folder.
        epochs: Stop recording after this many epochs; null = all. LP_app needs one.
        overwrite: Replace the scores of an earlier run; any other file is never touched.
    """

    def __init__(self, path: str | None = None, epochs: int | None = None, overwrite: bool = False) -> None:
        self.path, self.epochs, self.overwrite = path, epochs, overwrite

    def file(self, trainer: L.Trainer) -> Path:
        return Path(self.path or log_folder(trainer) / "scores.parquet")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if datamodule(trainer).scoring_dataloader is None:
            raise ValueError("ResponseLossRecorder needs an InstructionDataModule: its scoring_dataloader() is scored")
        file = self.file(trainer)  # on every rank: the logs' folder is agreed on by all
        wrong = trainer.strategy.broadcast(self._wrong(trainer, file) if trainer.is_global_zero else None)
        if wrong is not None:  # on every rank, or the others would wait for the first
            raise ValueError(wrong)
        if trainer.global_step == 0:
            self._record(trainer, pl_module, epoch=0)

    def _wrong(self, trainer: L.Trainer, file: Path) -> str | None:
        """Why scores cannot be written there."""
        try:
            if trainer.global_step == 0:
                check_output(file, self.overwrite, known=read_meta)
            elif not file.exists():
                return f"{file}: the scores of this run's earlier epochs are not there"
            elif read_meta(file)["fingerprint"] != datamodule(trainer).fingerprint:
                return f"{file}: holds scores of other records than this run's, or of another order"
        except ValueError as error:
            return str(error)
        return None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.epochs is None or epoch <= self.epochs:
            file = self.file(trainer)  # on every rank: the logs' folder is agreed on by all
            recorded = read_meta(file)["epochs"] if trainer.is_global_zero else 0
            if epoch > trainer.strategy.broadcast(recorded):
                self._record(trainer, pl_module, epoch)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        assert isinstance(pl_module, InstructionModule)
        data: Any = datamodule(trainer)
        records = np.asarray(data.train_sample_ids)
        losses, tokens = response_losses(trainer, pl_module, data.scoring_dataloader(), int(records.max()) + 1)
        self._write(self.file(trainer), epoch, records, losses[records], tokens[records], pl_module, data)
        trainer.strategy.barrier()

    @rank_zero_only
    def _write(
        self,
        path: Path,
        epoch: int,
        records: Any,
        losses: Any,
        tokens: Any,
        module: InstructionModule,
        data: Any,
    ) -> None:
        order = np.argsort(records)
        if epoch > 0:
            append_epoch(path, losses[order], epoch=epoch)
            return
        meta = {
            "fingerprint": data.fingerprint,
            "model": module.student_name or type(base_causal_lm(module.student)).__name__,
            "tokenizer": data.tokenizer.name_or_path,
            "template": data.encoder.fingerprint(),
            "max_length": data.max_length,
        }
        write_scores(path, records[order], tokens[order], losses[None, order], meta)


@torch.no_grad()
def response_losses(
    trainer: L.Trainer, module: InstructionModule, loader: Any, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean response loss and number of response tokens of every sample that a loader yields.

    Args:
        loader: batches; over all ranks, each sample once.
        size: the largest sample id + 1.

    Returns:
        Losses [size] float64, nan where a sample has no response token; tokens [size] int32. On every rank.
    """
    wide = sum_dtype(module.device)
    sums = torch.zeros(2, size, dtype=wide, device=module.device)  # no copy to the host until the end
    quiet = not (trainer.is_global_zero and sys.stderr.isatty())
    modes = [m for m in module.modules() if m.training]
    module.eval()
    with trainer.precision_plugin.forward_context():
        for batch in track(loader, "scoring", disable=quiet, transient=True):
            batch = module.lay_out(trainer.strategy.batch_to_device(batch))
            samples, nll = sample_tokens(module, batch)
            sums[0].index_add_(0, samples, nll.to(wide))
            sums[1].index_add_(0, samples, torch.ones_like(nll, dtype=wide))
    for m in modes:
        m.training = True
    reduced = trainer.strategy.reduce(sums, reduce_op="sum")
    total, count = torch.as_tensor(reduced).cpu().numpy()
    with np.errstate(invalid="ignore"):
        return total / np.where(count > 0, count, np.nan).astype(np.float64), count.astype(np.int32)


def sample_tokens(module: InstructionModule, batch: Any) -> tuple[Tensor, Tensor]:
    """The sample and the negative log-likelihood of every response token of a batch."""
    rows = response_rows(batch)
    states, head = hidden_states(module.student, batch)
    states, bound = states.flatten(0, 1)[rows.places], module.max_scratch_bytes
    scores = linear_token_scores(states, head, rows.targets, max_scratch_bytes=bound)
    return batch["sample_ids"].flatten()[rows.places], scores.nll
