"""RecordResults: what validation and test find, one row per held-out record; `compare` reads it."""

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_itk.batch import IGNORE_INDEX, Batch, is_packed, real_tokens, unpack
from lightning_itk.evaluation.record_results import write_results
from lightning_itk.methods.module import InstructionModule
from lightning_itk.metrics import same_words
from lightning_itk.models.generation import Generator
from lightning_itk.models.hidden import base_causal_lm
from lightning_itk.outputs import check_output
from lightning_itk.trainer import datamodule, log_folder


class RecordResults(Callback):
    """Write what validation or test finds of each record to a Parquet file, for `lightning-itk compare`.

    Columns: `record` (its number, int64), `tokens` (response tokens, int32), and float64 means over its response
    tokens: `response_loss` (nats), `token_accuracy`; with teachers `kl/NAME` (nats, the module's own kind and
    temperature), `teacher_response_loss/NAME` and `teacher_agreement/NAME`, without /NAME for KD's only one, nan where
    a record is not that teacher's. `exact_match` is 0 or 1. A later validation of the same run replaces the file.

    Args:
        path: The file; null = `results-val.parquet` or `results-test.parquet` in the logger's folder.
        exact_match: Also answer each record's prompt with the likeliest tokens (the module's max_new_tokens), and
            compare the answer with the record's first response, white space normalised.
        overwrite: Replace the results of an earlier run, if they are unchanged; nothing else is ever replaced.
            A resumed run that writes to the same path needs it.
    """

    def __init__(self, path: str | None = None, exact_match: bool = False, overwrite: bool = False) -> None:
        self.path, self.exact_match, self.overwrite = path, exact_match, overwrite
        self._sums: dict[str, dict[int, list[float]]] = {}  # figure -> record -> [sum, tokens]
        self._ours: Path | None = None  # a file that this very run wrote

    def file(self, trainer: L.Trainer) -> Path:
        stage = "test" if trainer.testing else "val"
        return Path(self.path or log_folder(trainer) / f"results-{stage}.parquet")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        file = self.file(trainer)  # on every rank: the logs' folder is agreed on by all
        wrong = trainer.strategy.broadcast(self._wrong(file) if trainer.is_global_zero else None)
        if wrong is not None:  # on every rank, or the others would wait for the first
            raise ValueError(wrong)

    def _wrong(self, file: Path) -> str | None:
        try:
            if file != self._ours:
                check_output(file, self.overwrite)
        except ValueError as error:
            return str(error)
        return None

    # Validation and test are the same here.

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = defaultdict(dict)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any, **__: Any
    ) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, InstructionModule)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for name, (samples, values) in pl_module.evaluate_tokens(outputs).items():
                self._add(name, samples, values)
            if self.exact_match:
                for sample, hit in exact_matches(trainer, pl_module, batch):
                    self._sums["exact_match"][sample] = [float(hit), 1.0]

    on_test_batch_end = on_validation_batch_end

    def _add(self, name: str, samples: Tensor, values: Tensor) -> None:
        table = self._sums[name]
        for sample, value in zip(samples.tolist(), values.double().tolist(), strict=True):
            entry = table.setdefault(sample, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        parts: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, dict(self._sums))
        else:
            parts = [self._sums]
        file = self.file(trainer)
        if trainer.is_global_zero:
            sums: dict[str, dict[int, list[float]]] = defaultdict(dict)
            for part in parts:
                for name, table in part.items():
                    sums[name] |= table
            write_results(file, sums, self._meta(trainer, cast(InstructionModule, pl_module)))
        self._ours = file
        self._sums = {}
        trainer.strategy.barrier()

    on_test_epoch_end = on_validation_epoch_end

    def _meta(self, trainer: L.Trainer, module: InstructionModule) -> dict[str, Any]:
        stage = "test" if trainer.testing else "val"
        data = datamodule(trainer)
        return {
            "stage": stage,
            "step": trainer.global_step,
            "method": type(module).__name__,
            "student": module.student_name,
            "data": data.held_out_fingerprint and data.held_out_fingerprint(stage),
            "max_length": data.max_length,
        }


def exact_matches(trainer: L.Trainer, module: InstructionModule, batch: Batch) -> list[tuple[int, bool]]:
    """Whether the student's greedy answer to each sample's first prompt is the sample's own: (record, equal)."""
    data = datamodule(trainer)
    tokenizer = data.tokenizer or module.tokenizer
    rows = unpack(batch) if is_packed(batch) else batch
    prompts, references, records = [], [], []
    real = real_tokens(rows)
    for ids, labels, samples, mask in zip(rows["input_ids"], rows["labels"], rows["sample_ids"], real, strict=True):
        learned = (labels != IGNORE_INDEX).nonzero().flatten()
        if not len(learned) or not learned[0]:
            continue
        start = int(learned[0])
        end = start + int((labels[start:] != IGNORE_INDEX).long().cumprod(0).sum())
        prompts.append(ids[mask][:start].cpu().numpy())
        references.append(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=True))
        records.append(int(samples[0]))
    if not prompts:
        return []
    generator = Generator(
        base_causal_lm(module.student),
        tokenizer,
        stops=data.encoder.stop_tokens() if data.encoder else (),
        max_new_tokens=module.max_new_tokens,
    )
    answers = generator.answer(prompts)
    found = zip(records, answers, references, strict=True)
    return [(record, same_words(answer.text, str(reference))) for record, answer, reference in found]
