"""The one loss path of KD and DAE: a student, named teachers, and what each makes of its own samples."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lightning_itk.batch import Batch, ResponseRows, response_rows
from lightning_itk.cached.manifest import is_cached_teacher
from lightning_itk.losses.chunked import Head, linear_token_scores
from lightning_itk.losses.divergence import Divergence, Kind
from lightning_itk.losses.per_token import linear_token_divergence
from lightning_itk.losses.token import LossParts, linear_kl_parts
from lightning_itk.losses.topk import TopK, topk_kl_parts
from lightning_itk.methods.attention_maps import AttentionDistiller, AttentionLoss
from lightning_itk.methods.cached_teacher import AnyTeacher, CachedTeacher
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.step import ForwardPass, Term, TokenFigure
from lightning_itk.methods.teacher import SoftTargets, Teacher
from lightning_itk.models.hidden import HiddenStates
from lightning_itk.models.loading import DType
from lightning_itk.models.offload import leave_to_host
from lightning_itk.models.sharded_loading import deferred_loading
from lightning_itk.trainer import datamodule


class DistillationPass(ForwardPass):
    """A forward pass of the student beside its teachers."""

    def __init__(
        self,
        batch: Batch,
        rows: ResponseRows,
        student: HiddenStates,
        targets: dict[str, SoftTargets],  # by teacher; one without samples is not in it
        attention: dict[str, Tensor],  # by teacher, the attention loss; empty where that is off
    ) -> None:
        super().__init__(batch, rows, student)
        self.targets, self.attention = targets, attention


class DistillationModule(InstructionModule):
    """A student that learns from named teachers; the base of KDModule and DAEModule, which say whose samples are whose.

    Args:
        temperature: Divides the logits of both models in the divergence.
        ce_weight: Weight of the cross-entropy with the responses.
        kl_weight: Weight of T^2 times the divergence.
        kind: forward = KL(teacher || student), reverse = KL(student || teacher), or jsd.
        beta: The teacher's share in the mixture of jsd.
        attention: The attention term; null = off.
        teacher_dtype: Precision of the teachers' weights; auto keeps the checkpoints'.
        teacher_offload: Keep the teachers' decoder layers in host memory; each comes to the device when it runs. For
            teachers that do not fit beside the student; the results are the same, and every step copies the layers.
        teacher_kwargs: More arguments for the teachers' from_pretrained: revision, gguf_file, quantization_config, ...
    """

    def __init__(
        self,
        student: str | PreTrainedModel,
        *,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kl_weight: float = 1.0,
        kind: Kind = "forward",
        beta: float = 0.5,
        attention: AttentionLoss | None = None,
        teacher_dtype: DType = "auto",
        teacher_kwargs: dict[str, Any] | None = None,
        teacher_offload: bool = False,
        **kwargs: Any,
    ) -> None:
        Divergence(kind, beta, temperature)  # refuses what makes no sense before a model is loaded
        attention = AttentionLoss(**attention) if isinstance(attention, dict) else attention
        _check_weights(
            ce_weight=ce_weight, kl_weight=kl_weight, attention_weight=attention.weight if attention else 0.0
        )
        super().__init__(student, **kwargs)
        self.temperature, self.ce_weight, self.kl_weight = temperature, ce_weight, kl_weight
        self.kind: Kind = kind
        self.beta, self.attention = beta, attention
        self._teacher_options: dict[str, Any] = {"dtype": teacher_dtype, "model_kwargs": teacher_kwargs}
        self._teacher_options["offload"] = teacher_offload

    def learn_from(self, teachers: Mapping[str, str | PreTrainedModel | AnyTeacher]) -> None:
        """Load the teachers; called once. The one named "" gives terms without a name.

        No argument of `__init__`, because Lightning would store it as one beside a subclass's own.
        """
        self._names = list(teachers)  # they may hold characters that a ModuleDict refuses
        self._teachers = torch.nn.ModuleList(self._loaded(teacher) for teacher in teachers.values())
        self.teacher_weights = dict.fromkeys(teachers, 1.0)
        leave_to_host(self, [teacher.model for teacher in self.teachers.values() if isinstance(teacher, Teacher)])
        self._distiller: AttentionDistiller | None = None
        if self.attention and self.attention.weight:
            self._distiller = AttentionDistiller(self.attention, self.student, self.teachers, self.impl)

    def _loaded(self, teacher: str | PreTrainedModel | AnyTeacher) -> AnyTeacher:
        """A teacher; where both are given by name, it must have the student's tokenizer."""
        if isinstance(teacher, str) and is_cached_teacher(teacher):
            loaded: AnyTeacher = CachedTeacher(teacher)
        elif isinstance(teacher, str | PreTrainedModel):
            loading = {"trust_remote_code": self.hparams["trust_remote_code"], **self._teacher_options}
            with deferred_loading(self._sharded_loading):
                loaded = Teacher(teacher, **loading)
        else:
            loaded = teacher
        if isinstance(loaded, CachedTeacher):
            self._check_cached(loaded)
        if isinstance(teacher, str) and self.student_name:
            loaded.check_tokenizer(self.tokenizer)
        return loaded

    def _check_cached(self, teacher: CachedTeacher) -> None:
        """Refuse what a teacher that is known by its top k cannot serve."""
        if teacher.manifest.mode != "topk":
            return
        if type(self).divergence is not DistillationModule.divergence:
            raise ValueError(
                f"{teacher.name} holds the teacher's top k only, but {type(self).__name__} has a divergence of its "
                "own, which needs its states: run cache-teacher with --mode states"
            )
        if (stored := teacher.manifest.settings["temperature"]) != self.temperature:
            raise ValueError(
                f"{teacher.name} holds the teacher's top k at temperature {stored:g}, temperature is "
                f"{self.temperature:g}: cache it again, or with --mode states, which serves any"
            )

    @property
    def teachers(self) -> Mapping[str, AnyTeacher]:
        return dict(zip(self._names, self._teachers, strict=True))  # type: ignore[arg-type]

    @property
    def attention_head_dim(self) -> int | None:
        """The largest head dimension of the layers whose maps are compared; None without the attention term."""
        return self._distiller.head_dim if self._distiller else None

    def models(self) -> Iterable[torch.nn.Module]:
        yield self.student
        for teacher in self.teachers.values():
            if isinstance(teacher, Teacher):
                yield teacher.model

    def check_models(self) -> None:
        if self._distiller is not None:
            self._distiller.prove()

    def teaches(self, name: str, tag: str) -> bool:
        """Whether samples with this tag are the teacher's."""
        return True

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for name, teacher in self.teachers.items():
            if isinstance(teacher, CachedTeacher):
                teacher.check_data(datamodule(self.trainer), partial(self.teaches, name))

    def soft_targets(self, batch: Batch, rows: ResponseRows) -> dict[str, SoftTargets]:
        """By teacher, what the student is to match on the samples that are its own; one without any is left out."""
        raise NotImplementedError(f"{type(self).__name__} must say which samples are whose")

    def divergence(
        self,
        student_states: Float[Tensor, "N H"],
        student_head: Head,
        teacher_states: Float[Tensor, "N Ht"],
        teacher_head: Head,
        targets: Int[Tensor, " N"],
    ) -> LossParts:
        """The token loss at one teacher's response rows, summed; override it to distil with another one.

        No target is -100. An override applies temperature, ce_weight and kl_weight itself, as far as they mean
        something to it; `losses.linear_divergence` takes any loss of two rows of logits, and runs in torch, within
        `max_scratch_bytes` if that is handed on.
        """
        return linear_kl_parts(
            student_states,
            student_head,
            teacher_states,
            teacher_head,
            targets,
            self._how,
            impl=self.impl,
            has_ignored=False,
            max_scratch_bytes=self.max_scratch_bytes,
        )

    @property
    def _how(self) -> Divergence:
        return Divergence(self.kind, self.beta, self.temperature, self.ce_weight, self.kl_weight)

    def _token_loss(self, states: Float[Tensor, "N H"], head: Head, target: SoftTargets) -> LossParts:
        if isinstance(target.answer, TopK):
            how, bound = self._how, self.max_scratch_bytes
            return topk_kl_parts(states, head, target.answer, target.targets, how, max_scratch_bytes=bound)
        return self.divergence(states, head, *target.answer, target.targets)

    def run_models(self, batch: Batch) -> DistillationPass:
        rows = response_rows(batch)
        targets = self.soft_targets(batch, rows)
        if self._distiller is None:
            return DistillationPass(batch, rows, self.run_student(batch), targets, {})
        with self._distiller.attach(targets) as attention:
            student = self.run_student(batch)
        return DistillationPass(batch, rows, student, targets, attention)

    def losses(self, batch: Batch) -> dict[str, Term]:
        """By teacher: `distillation` (CE and KL, weighted) and `attention`; for the log `kl` and `ce`."""
        run = self.forward_pass(batch)
        assert isinstance(run, DistillationPass)
        states, head = run.student
        nothing = states[:0].float().sum()  # 0, with a graph
        if not any(self.teacher_weights[name] for name in run.targets):
            # Other ranks wait for the head's gradient, too. Only here: it costs a tensor of the head's size.
            nothing = nothing + head.weight[:0].float().sum()
        terms: dict[str, Term] = {}
        for name, weight in self.teacher_weights.items():
            parts, count, suffix = LossParts(nothing, nothing, nothing), 0, _suffix(name)
            if own := run.targets.get(name):
                rows = states.flatten(0, 1)[own.student_rows]
                parts = self._token_loss(rows, head, own)
                if not isinstance(parts, LossParts):
                    raise ValueError(f"divergence must return LossParts, found {type(parts).__name__}")
                count = own.targets.numel()
            elements = torch.full((), count, device=states.device)  # filled there: a copy would wait
            terms[f"distillation{suffix}"] = Term(parts.loss, weight, elements)
            terms[f"kl{suffix}"], terms[f"ce{suffix}"] = Term(parts.kl, 0.0, elements), Term(parts.ce, 0.0, elements)
            if self.attention is not None and self._distiller is not None:
                total = run.attention.get(name, nothing)
                terms[f"attention{suffix}"] = Term(total, weight * self.attention.weight, elements)
        return terms

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name in [name for name in checkpoint.get("state_dict", {}) if name.startswith("teacher.")]:
            del checkpoint["state_dict"][name]  # version 0.1 let the head of a tied teacher in

    def evaluate(self, batch: Batch) -> dict[str, Term]:
        """The student's own figures; by teacher its loss (the ceiling) and how often both would say the same token."""
        run = self.forward_pass(batch)
        assert isinstance(run, DistillationPass)
        figures = super().evaluate(batch)
        states, head = run.student
        for name in self._names:
            loss = agreement = count = torch.zeros((), device=states.device)
            if own := run.targets.get(name):
                targets, bound = own.targets, self.max_scratch_bytes
                rows = states.flatten(0, 1)[own.student_rows]
                student = linear_token_scores(rows, head, targets, max_scratch_bytes=bound)
                teacher = own.answer.scores(targets, bound)
                loss, agreement = teacher.nll.sum(), (student.top1 == teacher.top1).sum()
                count = torch.full((), targets.numel(), device=states.device)
            figures[f"teacher_response_loss{_suffix(name)}"] = Term(loss, elements=count)
            figures[f"teacher_agreement{_suffix(name)}"] = Term(agreement, elements=count)
        return figures

    def evaluate_tokens(self, batch: Batch) -> dict[str, TokenFigure]:
        """Beside the student's own: by teacher the divergence, as it is trained, its loss, and the agreement."""
        run = self.forward_pass(batch)
        assert isinstance(run, DistillationPass)
        figures = super().evaluate_tokens(batch)
        how = Divergence(self.kind, self.beta, self.temperature)
        for name, own in run.targets.items():
            samples = batch["sample_ids"].flatten()[own.student_rows]
            states = run.student.states.flatten(0, 1)[own.student_rows]
            bound = self.max_scratch_bytes
            student = linear_token_scores(states, run.student.head, own.targets, max_scratch_bytes=bound)
            teacher = own.answer.scores(own.targets, bound)
            found = {"teacher_response_loss": teacher.nll, "teacher_agreement": student.top1 == teacher.top1}
            if not isinstance(own.answer, TopK):  # which knows no more of a distribution than training needs
                found["kl"] = linear_token_divergence(
                    states, run.student.head, *own.answer, how, max_scratch_bytes=bound
                )
            figures |= {f"{figure}{_suffix(name)}": TokenFigure(samples, v) for figure, v in found.items()}
        return figures


def _suffix(name: str) -> str:
    return f"/{name}" if name else ""


def _check_weights(**weights: float) -> None:
    """Refuse negative weights, and a loss that is nothing at all."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must not be negative, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"nothing to learn: {', '.join(weights)} are all 0")
