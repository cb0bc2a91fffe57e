"""Knowledge distillation from one teacher, with an attention loss."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lightning_itk.batch import Batch
from lightning_itk.losses.chunked import Head
from lightning_itk.losses.divergence import Kind, check_divergence
from lightning_itk.losses.token import LossParts, linear_kl_parts
from lightning_itk.methods.distillation import (
    AttentionDistiller,
    AttentionLoss,
    Lesson,
    check_weights,
    load_teacher,
    teach,
    teacher_figures,
)
from lightning_itk.methods.module import InstructionModule, Ratio, Term
from lightning_itk.methods.teacher import Teacher
from lightning_itk.models.hidden import HiddenStates
from lightning_itk.models.loading import DType


class KDModule(InstructionModule):
    """Knowledge distillation (arXiv 2406.19112): learn the teacher's next-token distribution and its attention maps.

    loss = ce_weight * CE + kl_weight * T^2 * KL(teacher || student) + attention.weight * attention, per response
    token. The paper's lambda form is ce_weight = 1 - lambda, kl_weight = attention.weight = lambda; it used lambda 1
    and T 1.

    Args:
        teacher: Folder or hub name of the teacher, with the student's tokenizer (in Python also a model or Teacher).
        temperature: Divides the logits of both models in the divergence.
        ce_weight: Weight of the cross-entropy with the responses.
        kl_weight: Weight of the divergence.
        kind: forward = KL(teacher || student), reverse = KL(student || teacher), or jsd.
        beta: The teacher's share in the mixture of jsd.
        attention: The attention term; null = off.
        teacher_dtype: Precision of the teacher's weights; auto keeps the checkpoint's.
        teacher_kwargs: More arguments for the teacher's from_pretrained: quantization_config, device_map, ...
    """

    def __init__(
        self,
        student: str | PreTrainedModel,
        teacher: str | PreTrainedModel | Teacher,
        *,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kl_weight: float = 1.0,
        kind: Kind = "forward",
        beta: float = 0.5,
        attention: AttentionLoss | None = None,
        teacher_dtype: DType = "auto",
        teacher_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_divergence(kind, beta, temperature)
        attention = AttentionLoss(**attention) if isinstance(attention, dict) else attention
        attention_weight = attention.weight if attention else 0.0
        check_weights(ce_weight=ce_weight, kl_weight=kl_weight, attention_weight=attention_weight)
        super().__init__(student, **kwargs)
        self.temperature, self.ce_weight, self.kl_weight = temperature, ce_weight, kl_weight
        self.kind: Kind = kind
        self.beta, self.attention = beta, attention
        self.teacher = load_teacher(self, teacher, teacher_dtype, teacher_kwargs)
        self._distiller: AttentionDistiller | None = None
        if attention and attention.weight:
            self._distiller = AttentionDistiller(attention, self.student, {"": self.teacher}, self.impl)

    def models(self) -> Iterable[torch.nn.Module]:
        yield self.student
        yield self.teacher.model

    def divergence(
        self,
        student_states: Float[Tensor, "N H"],
        student_head: Head,
        teacher_states: Float[Tensor, "N Ht"],
        teacher_head: Head,
        targets: Int[Tensor, " N"],
    ) -> LossParts:
        """The token loss at the response rows, summed; override it to distil with another divergence."""
        return linear_kl_parts(
            student_states,
            student_head,
            teacher_states,
            teacher_head,
            targets,
            kind=self.kind,
            beta=self.beta,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kl_weight=self.kl_weight,
            impl=self.impl,
        )

    def lesson(self, batch: Batch) -> Lesson:
        """The teacher's answer to the batch; asked for once per batch."""
        return self.once(batch, "lesson", lambda: teach(self.teacher, batch))

    def run_student(self, batch: Batch) -> HiddenStates:
        if self._distiller is None:
            return super().run_student(batch)
        with self._distiller.attach({"": self.lesson(batch)}) as attention:
            states = super().run_student(batch)
        self.once(batch, "attention", lambda: attention[""])
        return states

    def losses(self, batch: Batch) -> dict[str, Term]:
        """`distillation` (CE and KL, weighted), `attention`, and for the log `kl` and `ce`."""
        states, head = self.student_states(batch)
        lesson = self.lesson(batch)
        rows, teacher_states, targets = lesson.responses()
        parts = self.divergence(states.flatten(0, 1)[rows], head, teacher_states, lesson.answer.head, targets)
        terms = {"distillation": Term(parts.loss), "kl": Term(parts.kl, 0.0), "ce": Term(parts.ce, 0.0)}
        if self.attention is not None and self._distiller is not None:
            attention = self.once(batch, "attention", lambda: None)
            terms["attention"] = Term(attention, self.attention.weight)
        return terms

    def evaluate(self, batch: Batch) -> dict[str, Ratio]:
        """The student's own figures, the teacher's loss (the ceiling), and how often both would say the same."""
        figures = teacher_figures(self.lesson(batch), *self.student_states(batch))
        return super().evaluate(batch) | {name: Ratio(*figure) for name, figure in figures.items()}
