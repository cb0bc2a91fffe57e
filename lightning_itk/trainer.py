"""What modules, callbacks and data ask of a Trainer: its share of the work, and the data module it trains on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import lightning as L
import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_itk.batch import Batch


class Replica(NamedTuple):
    """One of the copies of the model that train on different batches at once; ranks that share a batch are one."""

    number: int = 0
    total: int = 1


def replica(trainer: L.Trainer | None) -> Replica:
    """The replica that this process belongs to; the only one where there is no trainer."""
    settings = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    return Replica(settings.get("rank", 0), settings.get("num_replicas", 1))


def log_folder(trainer: L.Trainer) -> Path:
    """Where a run writes what it is not told where to write. Ask on every rank: they agree on it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class InstructionData(Protocol):
    """What is asked of a data module, with the answer of one that does not know; see `InstructionDataModule`."""

    tokenizer: PreTrainedTokenizerBase | None = None
    encoder: Any = None  # ChatEncoder
    max_token_id: int = -1
    max_length: int | None = None
    batch_size: int | None = None
    packing: bool = False
    teachers: tuple[str, ...] = ()
    fingerprint: str | None = None
    held_out_fingerprint: Callable[[str], str] | None = None
    train_sample_ids: np.ndarray | None = None
    response_tokens: np.ndarray | None = None
    scoring_dataloader: Callable[[], Iterable[Batch]] | None = None


class _Answers:
    """A data module, with InstructionData's defaults for what it does not offer."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name, getattr(InstructionData, name))


def datamodule(trainer: L.Trainer) -> InstructionData:
    """The trainer's data module. Any may be used, and there may be none: what it does not offer has a default."""
    return cast(InstructionData, _Answers(getattr(trainer, "datamodule", None)))
