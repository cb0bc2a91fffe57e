"""The attention term: a student's layers paired with its teachers', and the loss taken inside its forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itk.attention.capture import AttentionTap, install, layer_map
from lightning_itk.attention.kl import layer_attention_kl
from lightning_itk.attention.layer import LayerAttention, Masks
from lightning_itk.batch import IGNORE_INDEX, Batch, cu_seqlens, is_packed, next_token_labels, real_tokens
from lightning_itk.losses.implementation import Impl, resolve_impl
from lightning_itk.methods.cached_teacher import AnyTeacher, StoredHeads
from lightning_itk.methods.teacher import SoftTargets
from lightning_itk.models.pruning import original_layers


@dataclass
class AttentionLoss:
    """The attention term: mean over layers and student heads of KL(teacher's map || student's map) at response rows.

    Args:
        weight: Its weight in the loss (the paper's value is 1).
        layers: "all", "every:n", student layers, or a map from student layers to teacher layers. Without a map,
            student layer l answers to teacher layer round((l + 1) * teacher layers / student layers) - 1, or, in a
            student that `prune` made of a model of the teacher's depth, to the layer that it was there.
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


class AttentionDistiller:
    """Pairs a student's layers with its teachers' and takes the attention loss inside the student's forward pass.

    Attributes:
        head_dim: the largest head dimension of the layers that are compared; 0 where no model could be tried out.
    """

    def __init__(self, loss: AttentionLoss, student: torch.nn.Module, teachers: Mapping[str, AnyTeacher], impl: Impl):
        self.loss, self.impl = loss, impl
        self.student: AttentionTap = install(student)
        self.layers: dict[str, dict[int, int]] = {}
        self._taps: dict[str, AttentionTap | StoredHeads] = {}
        self.head_dim = 0
        for name, teacher in teachers.items():
            depth = teacher.num_layers
            if isinstance(loss.layers, str) and loss.layers == "all" and depth < self.student.num_layers:
                raise ValueError(
                    f"attention loss: teacher {name!r} has {depth} layers and the student {self.student.num_layers}; "
                    "say in attention.layers which answer to which"
                )
            original = original_layers(self.student.model.config, depth)
            pairs = layer_map(self.student.num_layers, depth, loss.layers, original)
            self.layers[name] = pairs
            self._taps[name] = teacher.watch(sorted(set(pairs.values())))
        self._compare_heads()

    def prove(self) -> None:
        """Try models out whose weights came after this was made."""
        self.student.probe()
        for name, tap in self._taps.items():
            if isinstance(tap, AttentionTap):
                tap.probe(set(self.layers[name].values()))
        self._compare_heads()

    def _compare_heads(self) -> None:
        for name, tap in self._taps.items():
            for mine, theirs in self.layers[name].items():
                self._check_heads(name, self.student.heads.get(mine), tap.heads.get(theirs))
                dims = self.student.head_dims.get(mine, 0), tap.head_dims.get(theirs, 0)
                self.head_dim = max(self.head_dim, *dims)

    def _check_heads(self, name: str, mine: int | None, theirs: int | None) -> None:
        if mine and theirs and self.loss.head_map is None and mine % theirs and theirs % mine:
            raise ValueError(
                f"attention loss: the student has {mine} heads and teacher {name!r} {theirs}; neither divides the "
                "other, so say in attention.head_map which answer to which"
            )

    @contextmanager
    def attach(self, targets: Mapping[str, SoftTargets]) -> Iterator[dict[str, Tensor]]:
        """Take the attention losses of the student's forward pass inside this context.

        Yields a dict that holds, after the forward pass, each teacher's loss: the sum over its response rows of the
        mean over layers and student heads.
        """
        masks = {name: _masks(target.own.rows.host) for name, target in targets.items()}
        for name, target in targets.items():
            where = target.own.rows.places  # the torch engine looks at masks tile by tile, on the CPU
            if resolve_impl(self.impl, where, head_dim=self.head_dim) == "triton":
                masks[name] = _sent(masks[name], where.device)
        names = list(targets)
        how: dict[str, Any] = {key: getattr(self.loss, key) for key in ("kind", "temperature", "head_map")}
        how["impl"] = self.impl

        def layer_loss(layer: int, student: LayerAttention) -> Tensor:
            losses = []
            for name in names:
                pairs, target = self.layers[name], targets[name]
                if layer in pairs:
                    places = target.own.places
                    mine = replace(student, q=_gather(student.q, places), k=_gather(student.k, places))
                    theirs = target.attention[pairs[layer]]
                    losses.append(layer_attention_kl(mine, theirs, masks[name], **how) / len(pairs))
                else:
                    losses.append(student.q.new_zeros((), dtype=torch.float32))
            return torch.stack(losses)

        result: dict[str, Tensor] = {}
        layers = sorted({layer for name in names for layer in self.layers[name]})
        with self.student.attach(layer_loss, layers) as seen:
            yield result
        if names:
            result.update(zip(names, torch.stack(list(seen.values())).sum(0), strict=True))


def _masks(batch: Batch) -> Masks:
    rows = next_token_labels(batch) != IGNORE_INDEX
    return Masks(cu_seqlens(batch), None, rows) if is_packed(batch) else Masks(None, real_tokens(batch), rows)


def _sent(masks: Masks, device: torch.device) -> Masks:
    return Masks(*(mask if mask is None else mask.to(device, non_blocking=True) for mask in masks))


def _gather(t: Float[Tensor, "B H S D"], index: Int[Tensor, "b s"] | None) -> Float[Tensor, "b H s D"]:
    """The student's heads where a teacher's tokens stand. Padding takes any token: no kept row sees it."""
    if index is None:
        return t
    return t.transpose(1, 2).flatten(0, 1)[index.clamp_min(0)].transpose(1, 2)
