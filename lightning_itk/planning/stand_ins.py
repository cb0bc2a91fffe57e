"""What stands in for code that looks at numbers, which a simulation does not have."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers.masking_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lightning_itk.attention.capture import AttentionTap
from lightning_itk.attention.layer import LayerAttention
from lightning_itk.batch import Batch, ResponseRows
from lightning_itk.cached.manifest import HEAD
from lightning_itk.cached.shards import Shards, opened
from lightning_itk.losses.topk import TopK
from lightning_itk.methods import attention_maps, cached_teacher, teacher
from lightning_itk.methods import module as base
from lightning_itk.models.hidden import head_of
from lightning_itk.planning.setting import Setting


@contextmanager
def without_numbers(setting: Setting, load: Callable[..., Any]) -> Iterator[None]:
    """Models come without weights, and nothing looks at numbers: no proofs, no masks that depend on them."""

    def seen(tap: AttentionTap, layers: Any = None) -> None:
        tap.packed_rows = 2

    with ExitStack() as stack:
        for where, name, instead in (
            (base, "load_causal_lm", load),
            (teacher, "load_causal_lm", load),
            (base, "check_head", lambda _: None),
            (teacher, "check_head", lambda _: None),
            (base, "load_tokenizer", lambda *_, **__: None),
            *((kind, "check_tokenizer", lambda *_: None) for kind in (teacher.Teacher, cached_teacher.CachedTeacher)),
            (teacher, "select", lambda *_: None),
            (AttentionTap, "probe", seen),
            (nn.Module, "_apply", _converted({})),
            (attention_maps, "layer_attention_kl", _attention_loss),
            (attention_maps, "_masks", lambda _: None),
            (cached_teacher, "Shards", unset_fake_temporarily()(Shards)),
            (Shards, "head", _stored_head),
            (cached_teacher.CachedTeacher, "soft_targets", _stored),
            *([(teacher.Teacher, "forward", _as_if_cached)] if setting.cached_teacher else []),
            *([] if setting.packing else [(transformers.masking_utils, "is_tracing", lambda *_: False)]),
        ):
            stack.enter_context(patch.object(where, name, instead))
        yield


def _stored_head(self: Shards) -> dict[str, Tensor]:
    with unset_fake_temporarily(), opened(self.folder / HEAD) as file:
        kinds = {name: (file.get_slice(name).get_shape(), file.get_slice(name)[:0].dtype) for name in file.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}


def _stored(
    self: cached_teacher.CachedTeacher, batch: Batch, rows: ResponseRows, keep: Tensor | None = None
) -> teacher.SoftTargets | None:
    own = teacher.OwnRows.of(rows, keep)
    if own is None:
        return None
    count, made = own.rows.places.shape[0], self.manifest.settings

    def column(name: str, *shape: int) -> Tensor:
        with unset_fake_temporarily():
            kind = self.shards.empty(name)
        return torch.empty((*(shape or (count,)), *kind.shape[1:]), dtype=kind.dtype)

    def layer(number: int) -> LayerAttention:
        q, k = (column(f"{kind}.{number}", *batch["input_ids"].shape).transpose(1, 2) for kind in "qk")
        facts = self._attention()[number]
        return LayerAttention(q, k, **{name: facts[name] for name in ("scaling", "window", "softcap", "causal")})

    if self.manifest.mode == "states":
        answer: teacher.ResponseStates | TopK = teacher.ResponseStates(column("states"), self.head)
    else:
        answer = TopK(
            column("ids").long(), column("log_probs").float(), column("nll"),
            self.manifest.teacher["vocab"], made["temperature"],
        )  # fmt: skip
    return teacher.SoftTargets(own, answer, {number: layer(number) for number in self._watched})


def _as_if_cached(self: teacher.Teacher, batch: Batch) -> teacher.TeacherOutput:
    head = head_of(self.model)
    ids = batch["input_ids"]
    return teacher.TeacherOutput(head.weight.new_empty(*ids.shape, head.weight.shape[1]), head, {})


def _converted(made: dict[Tensor, Tensor]) -> Callable[..., nn.Module]:
    """`Module._apply` for fake parameters, which torch would swap and cannot; tied ones stay tied."""

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for module in self.modules() if recurse else [self]:
            for own, wrap in ((module._parameters, True), (module._buffers, False)):
                for name, old in own.items():
                    if old is None or (new := function(old.detach())).dtype == old.dtype:
                        continue
                    if old not in made:
                        made[old] = nn.Parameter(new, requires_grad=old.requires_grad) if wrap else new
                    own[name] = made[old]  # type: ignore[assignment]
        return self

    return apply


class _AttentionLoss(torch.autograd.Function):
    """Keeps what the attention loss keeps: the gradients of the student's queries and keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(q), torch.empty_like(k))
        return torch.zeros((), device=q.device)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return tuple(saved * upstream for saved in ctx.saved_tensors)


def _attention_loss(student: LayerAttention, teacher: LayerAttention, masks: Any, **how: Any) -> Tensor:
    return _AttentionLoss.apply(student.q, student.k)
