"""What test_distributed.py runs on every rank."""

from pathlib import Path

import lightning as L
import torch
from exact import SAMPLES, TAGS, module
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import byte_tokenizer
from torch.distributed.tensor import DTensor

from lightning_itk import batch as b
from lightning_itk.callbacks import HFExport, RunCard


class Halves(L.LightningDataModule):
    """Each rank's part of every global batch of 8."""

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        size = 8 // ranks
        batches = []
        for start in range(0, len(SAMPLES), 8):
            whole = SAMPLES[start : start + 8]
            own = whole[rank * size : (rank + 1) * size]
            if not own:  # a rank without samples still takes its step
                own = [whole[0]._replace(labels=whole[0].labels * 0 + b.IGNORE_INDEX)]
            batches.append(b.pad(own, pad_id=0, teachers=TAGS))
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def val_dataloader(self):
        return self.train_dataloader()


def train(method: str, strategy: str, folder: Path) -> None:
    """Train for two epochs; rank 0 writes weights and metrics."""
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=kind,
        max_epochs=2,
        logger=False,
        callbacks=[ModelCheckpoint(folder, save_last=True), RunCard(), HFExport(str(folder / "export"))],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    model = module(method)
    model.tokenizer = byte_tokenizer()
    trainer.fit(model, datamodule=Halves())
    state = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.student.named_parameters()
    }
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        torch.save({"weights": state, "metrics": metrics}, folder / "weights.pt")
