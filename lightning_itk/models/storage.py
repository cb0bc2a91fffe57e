"""How checkpoints reach the disk and come back: whole or not at all, and from any strategy to any other."""

import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from lightning_itk.files import remove, take_place
from lightning_itk.models.checkpoint import read_checkpoint
from lightning_itk.models.sharded import check_sharded, is_sharded, read_sharded


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoint files are written beside their place and then moved there, wherever TMPDIR lies; what had the name
    before is usable until then. Sharded checkpoint folders are read, too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        _check_place(path)
        unfinished = _unfinished(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            take_place(unfinished, path)
        except (OSError, RuntimeError) as error:  # torch's writer has its own error for a full disk
            unfinished.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise ValueError(f"{path}: the checkpoint cannot be written: {reason}") from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path) and Path(path).is_dir():
            return read_sharded(path)
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


def use_whole_checkpoints(strategy: Strategy) -> None:
    """Let a strategy save and load this way, unless the user gave it a `CheckpointIO` of their own."""
    if type(strategy.checkpoint_io) is not TorchCheckpointIO:
        return
    strategy.checkpoint_io = WholeCheckpointIO()
    if isinstance(strategy, ModelParallelStrategy):  # it does not ask its CheckpointIO
        strategy.save_checkpoint = partial(_save, strategy, strategy.save_checkpoint)  # type: ignore[method-assign]
        strategy.load_checkpoint = partial(_load, strategy, strategy.load_checkpoint)  # type: ignore[method-assign]


def _check_place(path: Path) -> None:
    """Refuse a folder that is no checkpoint: it is somebody's, and would be replaced."""
    if path.is_dir() and not is_sharded(path):
        raise ValueError(f"{path}: is a folder and no checkpoint: move it away, or save elsewhere")


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _save(strategy: Any, save: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
    """Let all ranks write a checkpoint beside its place, then move it there."""
    path = Path(strategy.broadcast(filepath))
    _check_place(path)
    unfinished = _unfinished(path)
    if strategy.is_global_zero:
        remove(unfinished)  # shards of another number of ranks may be in it
    strategy.barrier()
    save(checkpoint, unfinished, storage_options)
    strategy.barrier()
    if strategy.is_global_zero:
        take_place(unfinished, path)
    strategy.barrier()


def _load(strategy: Any, load: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """Load a sharded checkpoint, or a single file, into a module whose parameters are sharded."""
    path = Path(strategy.broadcast(checkpoint_path))
    if path.is_dir():
        check_sharded(path)  # torch would unpickle it without a look
        return load(path, weights_only=weights_only)
    checkpoint = read_checkpoint(path)
    module = strategy.lightning_module
    set_model_state_dict(module, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))
    names = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer, saved in zip(strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        own = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        by_name = _named(saved, own, path)
        set_optimizer_state_dict(module, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
    return checkpoint


def _named(optimizer: dict[str, Any], names: list[list[str]], path: Path) -> dict[str, Any]:
    """The state of an optimizer by the names of its parameters, which are given for every group."""
    groups = optimizer["param_groups"]
    if list(map(len, names)) != [len(group["params"]) for group in groups]:
        raise ValueError(f"{path}: its optimizer has other parameters than this run's")
    numbers = chain.from_iterable(group["params"] for group in groups)
    known = dict(zip(numbers, chain.from_iterable(names), strict=True))
    return {
        "state": {known[number]: state for number, state in optimizer["state"].items()},
        "param_groups": [{**group, "params": own} for group, own in zip(groups, names, strict=True)],
    }
