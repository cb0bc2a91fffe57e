"""Domain Alignment from Expert: every sample is distilled from the teacher of its own domain."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_itk.batch import Batch, ResponseRows
from lightning_itk.methods.cached_teacher import AnyTeacher
from lightning_itk.methods.distillation import DistillationModule
from lightning_itk.methods.teacher import SoftTargets
from lightning_itk.trainer import datamodule


class DAEModule(DistillationModule):
    """Domain Alignment from Expert (arXiv 2406.19112): one student, several teachers, each for its own samples.

    A sample's teacher is named by its tag in the data (a source's `teacher`, a record's `teacher` or `is_domain`).
    Each teacher runs on its own samples only. The loss is the same token mean as KD's over all samples together, so
    the balance between domains is the data's mix of tokens, unless teacher_weights say otherwise.

    Args:
        teachers: Name of a teacher -> folder or hub name, all with the student's tokenizer; some or all may be folders
            that `cache-teacher` wrote.
        teacher_weights: Factor on a teacher's losses; 1 where not given.
        default_teacher: Who teaches samples without a tag; null = the first of teachers.
    """

    def __init__(
        self,
        student: str | PreTrainedModel,
        teachers: dict[str, str] | dict[str, PreTrainedModel] | dict[str, AnyTeacher],
        *,
        teacher_weights: dict[str, float] | None = None,
        default_teacher: str | None = None,
        **kwargs: Any,
    ) -> None:
        _check_names(teachers, teacher_weights or {}, default_teacher)
        super().__init__(student, **kwargs)
        self.learn_from(teachers)
        self.default_teacher = default_teacher or next(iter(teachers))
        self.teacher_weights |= teacher_weights or {}

    def teacher_of(self, tag: str) -> str:
        """The name of the teacher for samples with this tag."""
        name = tag or self.default_teacher
        if name not in self._names:
            raise ValueError(f"the data names teacher {name!r}, but this module has {', '.join(self._names)}")
        return name

    def teaches(self, name: str, tag: str) -> bool:
        return self.teacher_of(tag) == name

    def soft_targets(self, batch: Batch, rows: ResponseRows) -> dict[str, SoftTargets]:
        owners = [self.teacher_of(tag) for tag in batch["teachers"]]
        targets = {}
        for name, teacher in self.teachers.items():
            tags = [number for number, owner in enumerate(owners) if owner == name]
            everything = len(tags) == len(owners)
            keep = None if everything else torch.isin(rows.host["teacher_ids"], torch.tensor(tags, dtype=torch.long))
            if (own := teacher.soft_targets(batch, rows, keep)) is not None:
                targets[name] = own
        return targets

    def on_fit_start(self) -> None:
        for tag in datamodule(self.trainer).teachers:
            self.teacher_of(tag)
        super().on_fit_start()


def _check_names(teachers: Mapping[str, Any], weights: Mapping[str, float], default: str | None) -> None:
    if not teachers:
        raise ValueError("teachers is empty: DAE needs at least one teacher")
    for name in [*weights, *([default] if default else [])]:
        if name not in teachers:
            raise ValueError(f"teacher {name!r} is not among teachers: {', '.join(teachers)}")
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"teacher_weights.{name} must not be negative, got {weight}")
    if weights and not any(weights.get(name, 1.0) for name in teachers):
        raise ValueError("nothing to learn: all teacher_weights are 0")
