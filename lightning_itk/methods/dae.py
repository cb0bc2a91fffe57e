"""Domain Alignment from Expert: every sample is distilled from the teacher of its own domain."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_itk.batch import Batch
from lightning_itk.losses.divergence import Kind, check_divergence
from lightning_itk.losses.token import linear_kl_parts
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


class DAEModule(InstructionModule):
    """Domain Alignment from Expert (arXiv 2406.19112): one student, several teachers, each for its own samples.

    A sample's teacher is named by its tag in the data (a source's `teacher`, a record's `teacher` or `is_domain`).
    Each teacher runs on its own samples only. The loss is the same token mean as KD's over all samples together, so
    the balance between domains is the data's mix of tokens, unless teacher_weights say otherwise.

    Args:
        teachers: Name of a teacher -> folder or hub name, all with the student's tokenizer.
        teacher_weights: Factor on a teacher's losses; 1 where not given.
        default_teacher: Who teaches samples without a tag; null = the first of teachers.
        temperature: Divides the logits of both models in the divergence.
        ce_weight: Weight of the cross-entropy with the responses.
        kl_weight: Weight of T^2 times the divergence.
        kind: forward = KL(teacher || student), reverse = KL(student || teacher), or jsd.
        beta: The teacher's share in the mixture of jsd.
        attention: The attention term; null = off, as in the paper.
        teacher_dtype: Precision of the teachers' weights; auto keeps the checkpoints'.
        teacher_kwargs: More arguments for the teachers' from_pretrained: quantization_config, device_map, ...
    """

    def __init__(
        self,
        student: str | PreTrainedModel,
        teachers: dict[str, str] | dict[str, PreTrainedModel] | dict[str, Teacher],
        *,
        teacher_weights: dict[str, float] | None = None,
        default_teacher: str | None = None,
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
        _check_names(teachers, teacher_weights or {}, default_teacher)
        super().__init__(student, **kwargs)
        self.temperature, self.ce_weight, self.kl_weight = temperature, ce_weight, kl_weight
        self.kind: Kind = kind
        self.beta, self.attention = beta, attention
        self.default_teacher = default_teacher or next(iter(teachers))
        self.teacher_weights = {name: (teacher_weights or {}).get(name, 1.0) for name in teachers}
        # Names may hold characters that a ModuleDict refuses, so it numbers them.
        loaded = {n: load_teacher(self, teacher, teacher_dtype, teacher_kwargs) for n, teacher in teachers.items()}
        self._names = list(loaded)
        self._teachers = torch.nn.ModuleList(loaded.values())
        self._distiller: AttentionDistiller | None = None
        if attention and attention.weight:
            self._distiller = AttentionDistiller(attention, self.student, loaded, self.impl)

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        return dict(zip(self._names, self._teachers, strict=True))  # type: ignore[arg-type]

    def models(self) -> Iterable[torch.nn.Module]:
        yield self.student
        for teacher in self.teachers.values():
            yield teacher.model

    def teacher_of(self, tag: str) -> str:
        """The name of the teacher for samples with this tag."""
        name = tag or self.default_teacher
        if name not in self._names:
            raise ValueError(f"the data names teacher {name!r}, but this module has {', '.join(self._names)}")
        return name

    def lessons(self, batch: Batch) -> dict[str, Lesson]:
        """By teacher, its answer to its own samples; a teacher without samples is not in it."""
        return self.once(batch, "lessons", lambda: self._lessons(batch))

    def _lessons(self, batch: Batch) -> dict[str, Lesson]:
        owners = [self.teacher_of(tag) for tag in batch["teachers"]]
        lessons = {}
        for name, teacher in self.teachers.items():
            tags = [number for number, owner in enumerate(owners) if owner == name]
            everything = len(tags) == len(owners)
            keep = None if everything else torch.isin(batch["teacher_ids"], batch["teacher_ids"].new_tensor(tags))
            lesson = teach(teacher, batch, keep)
            if lesson is not None:
                lessons[name] = lesson
        return lessons

    def run_student(self, batch: Batch) -> HiddenStates:
        if self._distiller is None:
            return super().run_student(batch)
        with self._distiller.attach(self.lessons(batch)) as attention:
            states = super().run_student(batch)
        self.once(batch, "attention", lambda: attention)
        return states

    def losses(self, batch: Batch) -> dict[str, Term]:
        """By teacher: `distillation/NAME` (CE and KL, weighted), `attention/NAME`; for the log `kl/NAME`, `ce/NAME`."""
        states, head = self.student_states(batch)
        lessons = self.lessons(batch)
        nothing = states.flatten()[:0].float().sum()  # 0, with a graph
        terms: dict[str, Term] = {}
        for name, weight in self.teacher_weights.items():
            loss = ce = kl = attention = nothing
            elements: Tensor = torch.zeros((), device=states.device)
            if name in lessons:
                lesson = lessons[name]
                rows, teacher_states, targets = lesson.responses()
                loss, ce, kl = linear_kl_parts(
                    states.flatten(0, 1)[rows],
                    head,
                    teacher_states,
                    lesson.answer.head,
                    targets,
                    kind=self.kind,
                    beta=self.beta,
                    temperature=self.temperature,
                    ce_weight=self.ce_weight,
                    kl_weight=self.kl_weight,
                    impl=self.impl,
                )
                elements = elements + targets.numel()
                if self._distiller is not None:
                    attention = self.once(batch, "attention", dict)[name]
            terms[f"distillation/{name}"] = Term(loss, weight, elements)
            terms[f"kl/{name}"] = Term(kl, 0.0, elements)
            terms[f"ce/{name}"] = Term(ce, 0.0, elements)
            if self.attention is not None and self._distiller is not None:
                terms[f"attention/{name}"] = Term(attention, weight * self.attention.weight, elements)
        return terms

    def evaluate(self, batch: Batch) -> dict[str, Ratio]:
        """The student's own figures, and by teacher its loss (the ceiling) and how often both would say the same."""
        figures = super().evaluate(batch)
        states, head = self.student_states(batch)
        lessons, nothing = self.lessons(batch), torch.zeros((), device=states.device)
        for name in self._names:
            own = {"teacher_response_loss": (nothing, nothing), "teacher_agreement": (nothing, nothing)}
            if name in lessons:
                own = teacher_figures(lessons[name], states, head)
            figures |= {f"{key}/{name}": Ratio(*figure) for key, figure in own.items()}
        return figures

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for tag in getattr(getattr(self.trainer, "datamodule", None), "teachers", None) or ():
            self.teacher_of(tag)


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
