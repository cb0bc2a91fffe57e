"""Knowledge distillation from one teacher, with an attention loss."""

from typing import Any

from transformers import PreTrainedModel

from lightning_itk.batch import Batch, ResponseRows
from lightning_itk.methods.distillation import DistillationModule
from lightning_itk.methods.teacher import SoftTargets, Teacher


class KDModule(DistillationModule):
    """Knowledge distillation (arXiv 2406.19112): learn the teacher's next-token distribution and its attention maps.

    loss = ce_weight * CE + kl_weight * T^2 * KL(teacher || student) + attention.weight * attention, per response
    token. The paper's lambda form is ce_weight = 1 - lambda, kl_weight = attention.weight = lambda; it used lambda 1
    and T 1.

    Args:
        teacher: Folder or hub name of the teacher, with the student's tokenizer (in Python also a model or Teacher).
    """

    def __init__(self, student: str | PreTrainedModel, teacher: str | PreTrainedModel | Teacher, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)
        self.learn_from({"": teacher})

    @property
    def teacher(self) -> Teacher:
        return self.teachers[""]

    def soft_targets(self, batch: Batch, rows: ResponseRows) -> dict[str, SoftTargets]:
        targets = self.teacher.soft_targets(batch, rows)
        assert targets is not None
        return {"": targets}
