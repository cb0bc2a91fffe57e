"""What test_resume.py runs in processes of its own: a training run that may be killed at any micro-batch."""

import json
import os
import random
import signal
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import QUIET, byte_tokenizer, routed_model, tiny_model

import lightning_itk as itk
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.recorder import ResponseLossRecorder


def write_records(folder: Path) -> str:
    """42 prompts with completions of very different lengths, in a file."""
    rng = random.Random(0)
    rows = [
        {"prompt": "say " + "ab" * rng.randint(1, 8), "completion": "cd" * rng.randint(1, 20) + str(i)}
        for i in range(42)
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Kill(Callback):
    """kill -9 right after a number of micro-batches."""

    def __init__(self, after: int) -> None:
        self.after, self.seen = after, 0

    def on_train_batch_end(self, *_) -> None:
        self.seen += 1
        if self.seen == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def train(method: str, data: str, folder: Path, output: Path, resume: bool = False, kill_after: int = 0) -> None:
    """Train with dropout, accumulation and a schedule; write the final weights and every batch's samples."""
    L.seed_everything(0)
    student = tiny_model("llama", 0, attention_dropout=0.1)
    common = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
    if method == "moe":
        student, common["router_weight"] = routed_model(0, attention_dropout=0.1), 0.1
    if method in ("sft", "moe"):
        model: itk.InstructionModule = itk.SFTModule(student, **common)
    else:
        model = itk.KDModule(student, tiny_model("llama", 1), attention=AttentionLoss(), **common)
    datamodule = itk.InstructionDataModule(
        data, tokenizer=byte_tokenizer(), max_length=96, batch_size=2, num_proc=1, cache_dir=str(folder / "cache")
    )
    callbacks: list[Callback] = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
    callbacks += [Kill(kill_after)] if kill_after else []
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        accumulate_grad_batches=3,
        val_check_interval=7,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        deterministic=True,
    )
    checkpoints = sorted(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoints[-1] if resume else None, weights_only=True)
    torch.save({"weights": model.state_dict(), "step": trainer.global_step}, output)


class Numbered(ModelCheckpoint):
    """A file of its own for every save, and a save whenever it may be, twice at one step as well."""

    def _should_skip_saving_checkpoint(self, trainer) -> bool:
        return False

    def _format_checkpoint_name(self, *args, **kwargs) -> str:
        self.saves = getattr(self, "saves", 0) + 1
        return f"{self.saves:03}"


class Seen(Callback):
    """What came after which micro-batch, as a part of the checkpoints: a resumed run goes on with it."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.seen[f"validation after {batches}"] = float(trainer.callback_metrics["val/loss"])

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.seen[f"end of epoch {trainer.current_epoch}"] = float(trainer.global_step)

    def state_dict(self) -> dict[str, float]:
        return self.seen

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seen = state_dict


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """A schedule without patience: the rate falls after every epoch."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=-1)


def train_windows(
    data: str,
    folder: Path,
    output: Path,
    when: str,
    resume: Path | None = None,
    interval: int = 7,
    plateau: bool = False,
) -> None:
    """Two epochs with dropout, accumulation, a schedule and validation inside the epoch; saves that meet no window."""
    L.seed_everything(0)
    options = {"max_length": 96, "batch_size": 2, "num_proc": 1, "cache_dir": str(folder / "cache")}
    saving = {
        "validation": {"every_n_epochs": 1},
        "time": {"train_time_interval": timedelta(0)},
        "epoch": {"save_on_train_epoch_end": True},
    }[when]
    seen = Seen()
    callback = Numbered(folder / ("resumed" if resume else "saved"), save_top_k=-1, **saving)
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        accumulate_grad_batches=3,
        val_check_interval=interval,
        num_sanity_val_steps=0,
        callbacks=[seen, callback],
        deterministic=True,
    )
    model = itk.SFTModule(
        tiny_model("llama", 0, attention_dropout=0.1),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        **({"lr_scheduler": falling} if plateau else {}),
    )
    datamodule = itk.InstructionDataModule(data, tokenizer=byte_tokenizer(), **options)
    trainer.fit(model, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    logged = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of the logs
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    result = {"weights": model.state_dict(), "step": trainer.global_step, "logged": logged, "seen": seen.seen}
    torch.save(result | {"rate": rate}, output)


def record(data: str, folder: Path, kill_after: int = 0, options: dict | None = None) -> None:
    """Train two epochs with a ResponseLossRecorder; resume where a checkpoint is found."""
    L.seed_everything(0)
    settings = {"max_length": 96, "batch_size": 2, "num_proc": 1, "cache_dir": str(folder / "cache"), **(options or {})}
    datamodule = itk.InstructionDataModule(data, tokenizer=byte_tokenizer(), **settings)
    recorder = ResponseLossRecorder(str(folder / "scores.parquet"))
    scored = []
    original = recorder._record
    recorder._record = lambda trainer, module, epoch: (scored.append(epoch), original(trainer, module, epoch))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    callbacks: list[Callback] = [recorder, ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)]
    trainer = L.Trainer(
        **QUIET,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=2,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[*callbacks, *([Kill(kill_after)] if kill_after else [])],
    )
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    model = itk.SFTModule(tiny_model("llama", 0), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoints[-1] if checkpoints else None, weights_only=True)
    torch.save(len(scored), folder / "scored.pt")
