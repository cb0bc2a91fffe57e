"""What test_simulation.py compares with: the live tensors of a real run, by the same tracker, and who runs it."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import QUIET, byte_tokenizer

from lightning_itk import batch as b
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.planning.tracker import Part, StepTracker

ROWS, LENGTH = 4, 128


class Rows(L.LightningDataModule):
    """Micro-batches of ROWS samples of LENGTH tokens, all learned, from one teacher."""

    def __init__(self, teacher: str) -> None:
        super().__init__()
        self.teacher = teacher

    def train_dataloader(self):
        ids = np.full(LENGTH, 5)
        batch = b.pad([b.Sample(ids, ids, number) for number in range(ROWS)], pad_id=0, teachers=(self.teacher,))
        return torch.utils.data.DataLoader([batch] * 8, batch_size=None)


class Peak(Callback):
    """The most live bytes of the second optimizer step, and its FLOPs."""

    def __init__(self) -> None:
        self.tracker = StepTracker()

    def on_train_start(self, trainer, pl_module):
        for model in pl_module.models():
            self.tracker.mark([*model.parameters(), *model.buffers()], Part.WEIGHTS)
        self.tracker.__enter__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and not self.tracker.moment:
            self.tracker.moment, self.tracker.flops = "step", 0

    def on_train_end(self, trainer, pl_module):
        self.tracker.__exit__(None, None, None)


def module(method: str, student: str, teacher: str, **how):
    if method == "dae":
        return DAEModule(student, {"one": student, "two": teacher}, **how)
    return KDModule(student, teacher, **how) if method == "kd" else SFTModule(student, **how)


def measure(folder: Path, name: str, method: str, models: tuple[str, str], how: dict, trainer: dict) -> None:
    """Train two steps and write the peak of each rank."""
    peak, fsdp2 = Peak(), trainer.pop("fsdp2", False)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if fsdp2 else "auto"
    options = {"devices": 2, "strategy": strategy} if fsdp2 else {}
    fit = L.Trainer(
        **QUIET, **options, **trainer, max_steps=2, callbacks=[peak], enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    made = module(method, *models, **how)
    made.tokenizer = byte_tokenizer()
    fit.fit(made, datamodule=Rows("one" if method == "dae" else ""))
    total, flops = sum(peak.tracker.peaks["step"].values()), peak.tracker.flops
    (folder / f"{name}.{fit.global_rank}.json").write_text(json.dumps({"peak": total, "flops": flops}))
