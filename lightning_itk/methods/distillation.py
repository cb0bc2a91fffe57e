"""What KD and DAE share: one teacher's lesson about a batch, and the attention loss on it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_itk.attention.capture import AttentionTap, LayerAttention, install, layer_map
from lightning_itk.attention.kl import attention_kl
from lightning_itk.batch import Batch, cu_seqlens, is_packed, next_token_labels, real_tokens, select
from lightning_itk.losses.chunked import Head, linear_token_scores
from lightning_itk.losses.implementation import Impl
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.teacher import Answer, Teacher
from lightning_itk.models.loading import DType


@dataclass
class AttentionLoss:
    """The attention term: mean over layers and student heads of KL(teacher's map || student's map) at response rows.

    Args:
        weight: Its weight in the loss (the paper's value is 1).
        layers: "all", "every:n", student layers, or a map from student layers to teacher layers. Without a map,
            student layer l answers to teacher layer round((l + 1) * teacher layers / student layers) - 1.
        head_map: Teacher head, or heads, of each student head. null pairs consecutive groups.
        kind: forward = KL(teacher || student), reverse = KL(student || teacher).
        temperature: Divides the scores of both models.
    """

    weight: float = 1.0
    layers: str | list[int] | dict[int, int] = "all"
    head_map: list[int] | list[list[int]] | None = None
    kind: str = "forward"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"attention.weight must not be negative, got {self.weight}")
        if self.kind not in ("forward", "reverse"):
            raise ValueError(f"attention.kind must be 'forward' or 'reverse', got {self.kind!r}")
        if self.temperature <= 0:
            raise ValueError(f"attention.temperature must be positive, got {self.temperature}")


class Lesson(NamedTuple):
    """A teacher's answer to the samples that are its own."""

    batch: Batch  # those samples only, in the layout of the student's batch
    places: Int[Tensor, "b s"] | None  # where each token stands in the student's flattened batch; None = the same place
    answer: Answer

    def responses(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n H"], Int[Tensor, " n"]]:
        """Rows of the student's flattened hidden states, the teacher's hidden states there, and the targets."""
        targets = next_token_labels(self.batch).flatten()
        rows = (targets >= 0).nonzero().flatten()
        student_rows = rows if self.places is None else self.places.flatten()[rows]
        return student_rows, self.answer.states.flatten(0, 1)[rows], targets[rows]


def teach(teacher: Teacher, batch: Batch, keep: Bool[Tensor, "B S"] | None = None) -> Lesson | None:
    """Run a teacher on its samples of a batch, and on nothing else.

    Args:
        keep: True on the tokens of its samples; None = all of them.

    Returns:
        The lesson, or None when no sample is the teacher's.
    """
    if keep is None:
        return Lesson(batch, None, teacher(batch))
    part = select(batch, keep)
    if part is None:
        if isinstance(teacher.model, FSDPModule):  # the other ranks wait for this one to gather the weights
            teacher(_first_token(batch))
        return None
    own, index = part
    return Lesson(own, index, teacher(own))


def _first_token(batch: Batch) -> Batch:
    return Batch(**{key: v[:1, :1] if isinstance(v, Tensor) else v for key, v in batch.items()})  # type: ignore[typeddict-item]


def teacher_figures(lesson: Lesson, states: Float[Tensor, "B S H"], head: Head) -> dict[str, tuple[Tensor, Tensor]]:
    """The teacher's own loss on the responses (the ceiling), and how often student and teacher would say the same.

    Args:
        states: the student's hidden states of the whole batch.

    Returns:
        By name, a sum and the number of elements in it.
    """
    rows, teacher_states, targets = lesson.responses()
    student = linear_token_scores(states.flatten(0, 1)[rows], head, targets)
    teacher = linear_token_scores(teacher_states, lesson.answer.head, targets)
    count = torch.tensor(targets.numel(), device=targets.device)
    return {
        "teacher_response_loss": (teacher.nll.sum(), count),
        "teacher_agreement": ((student.top1 == teacher.top1).sum(), count),
    }


def load_teacher(
    module: InstructionModule,
    teacher: str | PreTrainedModel | Teacher,
    dtype: DType = "auto",
    model_kwargs: dict[str, Any] | None = None,
) -> Teacher:
    """A teacher for a module's student; where both are given by name, it must have the student's tokenizer."""
    if isinstance(teacher, Teacher):
        return teacher
    loaded = Teacher(
        teacher, dtype=dtype, trust_remote_code=module.hparams["trust_remote_code"], model_kwargs=model_kwargs
    )
    if isinstance(teacher, str) and module.student_name:
        loaded.check_tokenizer(module.tokenizer)
    return loaded


def check_weights(**weights: float) -> None:
    """Refuse negative weights, and a loss that is nothing at all."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must not be negative, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"nothing to learn: {', '.join(weights)} are all 0")


class AttentionDistiller:
    """Pairs a student's layers with its teachers' and takes the attention loss inside the student's forward pass."""

    def __init__(self, loss: AttentionLoss, student: torch.nn.Module, teachers: Mapping[str, Teacher], impl: Impl):
        self.loss, self.impl = loss, impl
        self.student: AttentionTap = install(student)
        self.layers: dict[str, dict[int, int]] = {}
        for name, teacher in teachers.items():
            depth = teacher.model.config.get_text_config().num_hidden_layers
            if isinstance(loss.layers, str) and loss.layers == "all" and depth < self.student.num_layers:
                raise ValueError(
                    f"attention loss: teacher {name!r} has {depth} layers and the student {self.student.num_layers}; "
                    "say in attention.layers which answer to which"
                )
            pairs = layer_map(self.student.num_layers, depth, loss.layers)
            self.layers[name] = pairs
            tap = teacher.watch(sorted(set(pairs.values())))
            for mine, theirs in pairs.items():
                self._check_heads(name, self.student.heads.get(mine), tap.heads.get(theirs))

    def _check_heads(self, name: str, mine: int | None, theirs: int | None) -> None:
        if mine and theirs and self.loss.head_map is None and mine % theirs and theirs % mine:
            raise ValueError(
                f"attention loss: the student has {mine} heads and teacher {name!r} {theirs}; neither divides the "
                "other, so say in attention.head_map which answer to which"
            )

    @contextmanager
    def attach(self, lessons: Mapping[str, Lesson]) -> Iterator[dict[str, Tensor]]:
        """Take the attention losses of the student's forward pass inside this context.

        Yields a dict that holds, after the forward pass, each lesson's loss: the sum over its response rows of the
        mean over layers and student heads.
        """
        facts = {name: _Facts.of(lesson) for name, lesson in lessons.items()}
        names = list(lessons)

        def layer_loss(layer: int, student: LayerAttention) -> Tensor:
            losses = []
            for name in names:
                pairs, lesson = self.layers[name], lessons[name]
                if layer in pairs:
                    teacher = lesson.answer.attention[pairs[layer]]
                    losses.append(self._loss(student, teacher, lesson, facts[name]) / len(pairs))
                else:
                    losses.append(student.q.new_zeros((), dtype=torch.float32))
            return torch.stack(losses)

        result: dict[str, Tensor] = {}
        layers = sorted({layer for name in names for layer in self.layers[name]})
        with self.student.attach(layer_loss, layers) as seen:
            yield result
        if names:
            result.update(zip(names, torch.stack(list(seen.values())).sum(0), strict=True))

    def _loss(self, student: LayerAttention, teacher: LayerAttention, lesson: Lesson, facts: "_Facts") -> Tensor:
        q, k = (_gather(t, lesson.places) for t in (student.q, student.k))
        return attention_kl(
            q,
            k,
            teacher.q,
            teacher.k,
            scale_student=student.scaling,
            scale_teacher=teacher.scaling,
            causal=student.causal,
            window=_common_window(student, teacher),
            softcap_student=student.softcap,
            softcap_teacher=teacher.softcap,
            cu_seqlens=facts.cu_seqlens,
            key_mask=facts.key_mask,
            row_mask=facts.row_mask,
            kind=self.loss.kind,  # type: ignore[arg-type]
            temperature=self.loss.temperature,
            head_map=self.loss.head_map,
            impl=self.impl,
        )


class _Facts(NamedTuple):
    """What every layer needs to know of a lesson's batch; worked out once."""

    cu_seqlens: Tensor | None
    key_mask: Tensor | None
    row_mask: Tensor

    @staticmethod
    def of(lesson: Lesson) -> "_Facts":
        batch = lesson.batch
        packed = is_packed(batch)
        return _Facts(
            cu_seqlens(batch) if packed else None,
            None if packed else real_tokens(batch),
            next_token_labels(batch) >= 0,
        )


def _gather(t: Float[Tensor, "B H S D"], index: Int[Tensor, "b s"] | None) -> Float[Tensor, "b H s D"]:
    """The student's heads where the lesson's tokens stand. Padding takes any token: no kept row sees it."""
    if index is None:
        return t
    return t.transpose(1, 2).flatten(0, 1)[index.clamp_min(0)].transpose(1, 2)


def _common_window(student: LayerAttention, teacher: LayerAttention) -> int | None:
    """The keys that both maps cover; windows that are wider than the batch do not matter."""
    length = student.q.shape[2]
    windows = {None if w is None or w >= length else w for w in (student.window, teacher.window)}
    if len(windows) > 1 or student.causal != teacher.causal:
        raise ValueError(
            f"attention loss: a student layer sees {student.window or 'all'} keys and its teacher layer "
            f"{teacher.window or 'all'}; their maps cannot be compared, so leave the layer out of attention.layers"
        )
    return windows.pop()
