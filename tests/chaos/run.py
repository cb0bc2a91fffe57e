"""What a process that may be killed runs: the command line itself, and a journal of what it has done."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from lightning_itk.cli.main import main
from lightning_itk.data.module import InstructionDataModule

PHASES = ("start", "cache", "train", "save", "validate", "end")


class Journal:
    """JSON lines, each written whole by one call: what a killed process has written stays readable."""

    def __init__(self, path: str | Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.now = ""

    def write(self, **entry: Any) -> None:
        os.write(self.file, (json.dumps(entry) + "\n").encode())

    def phase(self, name: str) -> None:
        if name != self.now:
            self.now = name
            self.write(phase=name, time=time.time())


journal = Journal(os.devnull)


class Trace(Callback):
    """Writes the phases, samples and loss of every micro-batch, every validation and end of an epoch; the weights."""

    def on_train_batch_start(self, *_: Any) -> None:
        journal.phase("train")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        samples = batch["sample_ids"].unique().tolist()
        journal.write(at=[trainer.current_epoch, batch_idx], samples=samples, loss=float(outputs["loss"]))

    def on_validation_start(self, *_: Any) -> None:
        journal.phase("validate")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        journal.write(at=["validation", trainer.fit_loop.epoch_loop.batch_progress.total.ready], loss=loss)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        journal.write(at=["end of epoch", trainer.current_epoch])

    def on_save_checkpoint(self, *_: Any) -> None:
        journal.phase("save")  # until the next batch: removing an older checkpoint belongs to it

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        journal.phase("end")
        state = pl_module.state_dict().items()
        weights = {name: w.full_tensor() if isinstance(w, DTensor) else w.detach() for name, w in state}
        torch.save({"weights": weights, "step": trainer.global_step}, f"final-{trainer.global_rank}.pt")


def fit(folder: Path, attempt: int, arguments: list[str]) -> None:
    """Train in a folder as `lightning-itk fit` does, at the head of a process group of its own; exits as it does."""
    os.setpgid(0, 0)
    os.chdir(folder)
    rank = os.environ.get("RANK", "0")
    log = os.open(f"log-{attempt:02}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    tempfile.tempdir = None  # asks TMPDIR again, which the process that this one was forked from did not have
    prepare_data = InstructionDataModule.prepare_data

    def told(self: InstructionDataModule) -> None:
        journal.phase("cache")
        prepare_data(self)
        journal.phase("start")

    InstructionDataModule.prepare_data = told  # type: ignore[method-assign]
    sys.exit(train(attempt, int(rank), arguments))


def train(attempt: int, rank: int, arguments: list[str]) -> int:
    """`lightning-itk fit` in this process and folder, with a journal; its exit code."""
    global journal
    journal = Journal(f"journal-{attempt:02}-{rank}.jsonl")
    journal.phase("start")
    return main(["fit", *arguments])
