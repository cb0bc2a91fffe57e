"""Callbacks: the exported model, and a card that says what a run really does."""

import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_itk.losses.implementation import describe_impl
from lightning_itk.methods.cached_teacher import CachedTeacher
from lightning_itk.methods.module import InstructionModule
from lightning_itk.models.export import MAX_SHARD_SIZE, check_replaceable, export, split_weights
from lightning_itk.models.hidden import base_causal_lm
from lightning_itk.models.loading import DType
from lightning_itk.models.offload import is_offloaded
from lightning_itk.models.precision import reshard
from lightning_itk.outputs import check_output, note_output
from lightning_itk.planning.devices import total_memory
from lightning_itk.trainer import datamodule, log_folder, replica


class HFExport(Callback):
    """Keep the student as Hugging Face folders: `best` by a validation metric, `last` when training ends.

    Args:
        dirpath: Where; null = `export` in the logger's folder.
        monitor: The metric of `best`.
        mode: Whether a lower (min) or higher (max) metric is better.
        dtype: Precision of the saved weights; auto = as they are trained.
        max_shard_size: Size of a file of weights, such as 5GB. Under FSDP2 one file is gathered on rank 0 at a time.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        dtype: DType = "auto",
        max_shard_size: str = MAX_SHARD_SIZE,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"HFExport.mode must be 'min' or 'max', got {mode!r}")
        split_weights({}, max_shard_size)  # now, not after hours of training
        self.dirpath, self.monitor, self.mode, self.dtype = dirpath, monitor, mode, dtype
        self.max_shard_size = max_shard_size
        self.best: float | None = None

    def folder(self, trainer: L.Trainer) -> Path:
        return Path(self.dirpath or log_folder(trainer) / "export")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"HFExport: there is no metric {self.monitor!r} to monitor; there are {known}")
        sign, value = (1.0 if self.mode == "min" else -1.0), float(trainer.callback_metrics[self.monitor])
        if self.best is None or sign * value < sign * self.best:
            self.best = value
            self._export(trainer, pl_module, "best")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._export(trainer, pl_module, "last")

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, name: str) -> None:
        assert isinstance(pl_module, InstructionModule)
        tokenizer = datamodule(trainer).tokenizer or pl_module.tokenizer
        folder = self.folder(trainer) / name
        try:
            check_replaceable(folder)
        except ValueError as error:  # somebody's files came while it trained: keep them, and the student too
            folder = folder.with_name(f"{name}-step-{trainer.global_step}")
            rank_zero_warn(f"{error}; exported to {folder}")
        how: Any = {"dtype": self.dtype, "max_shard_size": self.max_shard_size}
        export(pl_module.student, tokenizer, folder, **how, write=trainer.is_global_zero)
        trainer.strategy.barrier()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in ("best", "last"):
            check_replaceable(self.folder(trainer) / name)  # now, not when hours of training are to be saved

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class RunCard(Callback):
    """Print, when training starts, what the run is made of: models, what trains, which kernels, tokens per step.

    Args:
        memory: A line on the memory that a rank will take; `lightning-itk fit` simulates it.
    """

    def __init__(self, memory: str | None = None) -> None:
        self.memory = memory

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, InstructionModule)
        facts = run_facts(trainer, pl_module)  # on every rank: the logs' folder is agreed on by all
        if not trainer.is_global_zero:
            return
        table = Table(title=type(pl_module).__name__, show_header=False, title_justify="left")
        if self.memory is not None:
            facts["memory of a rank"] = f"{self.memory}; there are {total_memory(pl_module.device) / 2**30:.3g}"
        for name, value in facts.items():
            table.add_row(name, value)
        Console().print(table)


class ResponseWriter(Callback):
    """Write what `predict` answers as JSON lines: `record`, the prompt's number, and `response`.

    A file that stands there already is refused before the first prompt.

    Args:
        path: Where; null = `responses.jsonl` in the logger's folder. With several ranks each writes its own file.
        overwrite: Replace what an earlier run wrote, if it is unchanged; nothing else is ever replaced.
    """

    def __init__(self, path: str | None = None, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.file = Path()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(self.path or log_folder(trainer) / "responses.jsonl")
        files = [path.with_suffix(f".{rank}{path.suffix}") for rank in range(trainer.world_size)]
        files = [path] if len(files) == 1 else files
        for file in files:  # every rank looks at all, so that all stop
            check_output(file, self.overwrite)
        trainer.strategy.barrier()
        self.file = files[trainer.global_rank]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        with self.file.open("a") as file:
            for record, response in outputs:
                file.write(json.dumps({"record": record, "response": response}, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        note_output(self.file)
        rank_zero_info(f"responses: {self.file}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.predicting and self.file.is_file():
            note_output(self.file)


def run_facts(trainer: L.Trainer, module: InstructionModule) -> dict[str, str]:
    """What RunCard prints, by name."""
    reshard(module)
    facts = {}
    for number, model in enumerate(module.models()):
        base = base_causal_lm(model)
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        attention = (base.config._attn_implementation or "eager").removeprefix("itk_")
        text = f"{base.config.name_or_path or type(base).__name__}: {_count(total)} parameters, "
        text += f"{_count(trained)} trained, " if number == 0 else "frozen, "
        text += "layers in host memory, " if is_offloaded(model) else ""
        facts["student" if number == 0 else f"teacher {number}"] = text + f"{base.dtype}, attention {attention}"
    for name, teacher in getattr(module, "teachers", {}).items():
        if isinstance(teacher, CachedTeacher):
            facts[f"cached teacher {name}".rstrip()] = teacher.describe()
    probe = torch.empty(0, device=module.device, dtype=base_causal_lm(module.student).dtype)
    kind, head_dim = (getattr(module, name, None) for name in ("kind", "attention_head_dim"))
    facts["losses"] = describe_impl(module.impl, probe, kind, head_dim)
    replicas, data = replica(trainer).total, datamodule(trainer)
    rows = data.batch_size
    shape = f"{rows or '?'} rows x {trainer.accumulate_grad_batches} micro-batches x {replicas} ranks"
    if data.response_tokens is not None and rows and not data.packing:
        tokens = float(data.response_tokens.mean()) * rows * trainer.accumulate_grad_batches * replicas
        shape += f", about {_count(int(tokens))} response tokens"
    facts["optimizer step"] = shape
    facts["precision"] = str(trainer.precision)
    facts["steps"] = f"{trainer.estimated_stepping_batches:g}"
    if trainer.log_dir:
        facts["logs"] = str(trainer.log_dir)
    return facts


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
