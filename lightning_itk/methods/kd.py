"""Knowledge distillation from one teacher, with an attention loss."""

from typing import Any

from transformers import PreTrainedModel

from lightning_itk.batch import Batch, ResponseRows
from lightning_itk.methods.cached_teacher import AnyTeacher
from lightning_itk.methods.distillation import DistillationModule
from lightning_itk.methods.teacher import SoftTargets


class KDModule(DistillationModule):
    """Knowledge distillation (arXiv 2406.19112): learn the teacher's next-token distribution and its attention maps.

    loss = ce_weight * CE + kl_weight * T^2 * KL(teacher || student) + attention.weight * attention, per response
    token. The paper's lambda form is ce_weight = 1 - lambda, kl_weight = attention.weight = lambda; it used lambda 1
    and T 1.

    Args:
        teacher: Folder or hub name of the teacher, with the student's tokenizer, or a folder that `cache-teacher` wrote
            (in Python also a model or Teacher).
    """

    def __init__(
        self, student: str | PreTrainedModel, teacher: str | PreTrainedModel | AnyTeacher, **kwargs: Any
    ) -> None:
        super().__init__(student, **kwargs)
        self.learn_from({"": teacher})

    @property
    def teacher(self) -> AnyTeacher:
        return self.teachers[""]

    def soft_targets(self, batch: Batch, rows: ResponseRows) -> dict[str, SoftTargets]:
        targets = self.teacher.soft_targets(batch, rows)
        assert targets is not None
        return {"": targets}
