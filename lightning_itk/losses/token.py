"""Token losses as pure functions: tensors in, one sum out.

Every function returns the SUM over its kept rows; the caller divides by the count that it knows to be right (see
`InstructionModule`). Softmaxes are taken in fp32 whatever the inputs: logits rounded to bf16 ruin the distillation
gradient near convergence. Shapes: N rows (tokens), H hidden size, V vocabulary.

The `linear_*` functions take hidden states and heads instead of logits, go through the rows in chunks, and make the
gradients on the way, so nothing of size N x V outlives a chunk. Those with a divergence of the kit are one operator
each for torch.compile, ignored rows included. `max_scratch_bytes` bounds what they hold beside inputs and gradients:
chunks of logits and what is made of them. None is 2 GiB in Triton, which takes at least 128 rows at a time; in torch it
is about 1.5 GiB on a GPU and 200 MiB on a CPU, and any bound leaves one row. A trained head adds to it: its gradient in
fp32 in torch; see kernels/README.md for Triton.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.losses.chunked import by_autograd, check_scratch, chunked_rows
from lightning_itk.losses.divergence import Divergence, Kind, distillation_loss
from lightning_itk.losses.head import Head
from lightning_itk.losses.implementation import Impl, resolve_impl
from lightning_itk.losses.operators import kept_rows, linear_parts


class LossParts(NamedTuple):
    """A distillation loss with its ingredients, all summed over the kept rows.

    Attributes:
        loss: ce_weight * ce + kl_weight * kl, a differentiable scalar.
        ce: the cross-entropy with the labels, detached: only logged.
        kl: the divergence, T² included, detached: only logged.
    """

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def cross_entropy(
    logits: Float[Tensor, "*rows V"], labels: Int[Tensor, "*rows"], *, impl: Impl = "auto"
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy over the rows whose label is not -100, in nats.

    Args:
        logits: any float dtype; the softmax is taken in fp32.
        labels: already aligned with the rows (shifted).
        impl: accepted for symmetry; torch's own fused kernel is used everywhere.
    """
    labels = _checked_labels(labels, logits.shape[:-1])
    resolve_impl(impl, logits)
    flat = _at_least_fp32(_rows_of(logits))
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def kl_divergence(
    student_logits: Float[Tensor, "*rows V"],
    teacher_logits: Float[Tensor, "*rows Vt"],
    labels: Int[Tensor, "*rows"] | None = None,
    *,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> Float[Tensor, ""]:
    """Sum over kept rows of T² x divergence between two sets of logits; only the student gets a gradient.

    Args:
        student_logits: any float dtype. Logits that are already bf16 carry a rounding error that no loss can undo.
        teacher_logits: may have another (padded) vocabulary size; both are cut to the common tokens.
        labels: already aligned with the rows; -100 drops a row. None keeps all.
        kind: "forward" = KL(teacher || student), "reverse" = KL(student || teacher), "jsd" = generalised
            Jensen-Shannon (see `divergence_rows`).
        beta: the teacher's share in the mixture of "jsd", in [0, 1].
        temperature: divides both logits; the result is multiplied by its square (Hinton et al., arXiv 1503.02531).

    Raises:
        ValueError: shapes that do not belong together, an unknown kind, temperature <= 0, beta outside [0, 1].
    """
    how = Divergence(kind, beta, temperature)
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"student and teacher have different rows: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = _rows_of(student_logits), _rows_of(teacher_logits.detach())
    if labels is not None:
        labels = _checked_labels(labels, student_logits.shape[:-1]).flatten()
    if resolve_impl(impl, student_logits, kind) == "triton":
        from lightning_itk.kernels.kl import kl_divergence as fused

        return fused(student, teacher, labels, kind=kind, beta=beta, temperature=temperature)
    student, teacher = student[:, :vocab], teacher[:, :vocab]
    if labels is None:
        labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
    else:
        _, (labels, student, teacher) = kept_rows(labels, student, teacher)
    row_loss = partial(distillation_loss, how=how, has_labels=False)
    return chunked_rows(row_loss, student, None, teacher, None, labels, parts=2)[0]


def linear_cross_entropy(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"] | Head,
    labels: Int[Tensor, " N"],
    *,
    impl: Impl = "auto",
    has_ignored: bool = True,
    max_scratch_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy of `hidden @ head.T` over the rows whose label is not -100, without the logits.

    Args:
        hidden: the head's input.
        head: its weight, or a `Head` with bias, scale and soft-cap.
        labels: already aligned with the rows (shifted).
        has_ignored: False = no label is -100, as in `batch.response_rows`; saves looking, which waits for a GPU.
        max_scratch_bytes: bound on the workspace; see the head of this file.
    """
    head = Head.of(head)
    _check_linear(hidden, head, "hidden")
    check_scratch(max_scratch_bytes)
    labels = _checked_labels(labels, hidden.shape[:-1])
    drop: dict[str, Any] = {"drop_ignored": has_ignored, "max_scratch_bytes": max_scratch_bytes}
    if resolve_impl(impl, hidden) == "triton":
        from lightning_itk.kernels.linear_kl import linear_cross_entropy as fused

        hidden, weight = _one_dtype(hidden, head.weight)
        return fused(hidden, weight, labels, bias=head.bias, scale=head.scale, softcap=head.softcap, **drop)
    return linear_parts(hidden, head, None, None, labels, None, **drop)[0]


def linear_kl_divergence(
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"] | Head,
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_head: Float[Tensor, "Vt Ht"] | Head,
    labels: Int[Tensor, " N"] | None = None,
    *,
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    impl: Impl = "auto",
    max_scratch_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over kept rows of ce_weight x CE + kl_weight x T² x divergence, from hidden states, without the logits.

    Args:
        student_hidden: the student head's input.
        student_head: its weight, or a `Head` with bias, scale and soft-cap. No gradient is made for a frozen one.
        teacher_hidden: the teacher's; never gets a gradient, nor does its head.
        teacher_head: may have another (padded) vocabulary size; both are cut to the common tokens.
        labels: already aligned with the rows; -100 drops a row before anything is computed. None keeps all.
        kind: see `kl_divergence`, as for beta and temperature.
        ce_weight: weight of the cross-entropy with `labels` (temperature 1).
        kl_weight: weight of the divergence.
        max_scratch_bytes: bound on the workspace; see the head of this file.

    Raises:
        ValueError: shapes that do not belong together, a cross-entropy without labels, or a bad option.
    """
    how, bound = Divergence(kind, beta, temperature, ce_weight, kl_weight), max_scratch_bytes
    models = student_hidden, student_head, teacher_hidden, teacher_head
    return linear_kl_parts(*models, labels, how, impl=impl, max_scratch_bytes=bound).loss


def linear_kl_parts(
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"] | Head,
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_head: Float[Tensor, "Vt Ht"] | Head,
    labels: Int[Tensor, " N"] | None = None,
    how: Divergence | None = None,
    *,
    impl: Impl = "auto",
    has_ignored: bool = True,
    max_scratch_bytes: int | None = None,
    **fields: Any,
) -> LossParts:
    """`linear_kl_divergence` with its two ingredients beside it, from the same pass. CE is 0 where labels are None.

    Args:
        how: the divergence; its fields may be given by name instead.
        has_ignored: False = no label is -100, as in `batch.response_rows`; saves looking, which waits for a GPU.
        max_scratch_bytes: bound on the workspace; see the head of this file.
    """
    how = Divergence(**fields) if how is None else how
    student, teacher = Head.of(student_head), Head.of(teacher_head)
    _check_linear(student_hidden, student, "student_hidden")
    _check_linear(teacher_hidden, teacher, "teacher_hidden")
    _check_rows(student_hidden, teacher_hidden)
    check_scratch(max_scratch_bytes)
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    drop: dict[str, Any] = {"drop_ignored": has_ignored and labels is not None, "max_scratch_bytes": max_scratch_bytes}
    if labels is not None:
        labels = _checked_labels(labels, student_hidden.shape[:-1])
    elif how.ce_weight:
        raise ValueError("ce_weight is not 0 but there are no labels to take a cross-entropy with")
    teacher_hidden, teacher = teacher_hidden.detach(), teacher.detach()
    if resolve_impl(impl, student_hidden, how.kind) == "triton":
        from lightning_itk.kernels.linear_kl import linear_kl_divergence as fused

        return LossParts(
            *fused(
                *_one_dtype(student_hidden, student.weight),
                *_one_dtype(teacher_hidden, teacher.weight),
                labels,
                student_bias=student.bias,
                teacher_bias=teacher.bias,
                student_scale=student.scale,
                teacher_scale=teacher.scale,
                student_softcap=student.softcap,
                teacher_softcap=teacher.softcap,
                **(vars(how) | drop),
            )
        )
    heads = student.cut(vocab), teacher.cut(vocab)
    return LossParts(*linear_parts(student_hidden, heads[0], teacher_hidden, heads[1], labels, how, **drop))


def linear_divergence(
    row_loss: Callable[[Float[Tensor, "n V"], Float[Tensor, "n V"], Int[Tensor, " n"]], Float[Tensor, " n"]],
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"] | Head,
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_head: Float[Tensor, "Vt Ht"] | Head,
    labels: Int[Tensor, " N"],
    *,
    max_scratch_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over kept rows of any loss between student and teacher logits, without holding the logits.

    Args:
        row_loss: `(student_logits, teacher_logits, labels) -> loss of each row`; called on chunks of kept rows with
            fp32 logits over the common vocabulary. Must be differentiable in the student's logits by autograd.
        max_scratch_bytes: bound on the workspace, as far as `row_loss` makes no more tensors than the kit's own do.
    """
    check_scratch(max_scratch_bytes)
    student, teacher = Head.of(student_head), Head.of(teacher_head).detach()
    _check_linear(student_hidden, student, "student_hidden")
    _check_linear(teacher_hidden, teacher, "teacher_hidden")
    _check_rows(student_hidden, teacher_hidden)
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    labels = _checked_labels(labels, student_hidden.shape[:-1])
    _, (labels, student_hidden, teacher_hidden) = kept_rows(labels, student_hidden, teacher_hidden.detach())

    def rows(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return row_loss(student, teacher, labels)

    heads, bound = (student.cut(vocab), teacher.cut(vocab)), max_scratch_bytes
    arguments = (student_hidden, heads[0], teacher_hidden, heads[1], labels)
    return chunked_rows(by_autograd(rows), *arguments, max_scratch_bytes=bound)[0]


def linear_loss(
    row_loss: Callable[[Float[Tensor, "n V"], Int[Tensor, " n"]], Float[Tensor, " n"]],
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"] | Head,
    labels: Int[Tensor, " N"],
    *,
    max_scratch_bytes: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over kept rows of any loss of a row of logits, without holding the logits: `linear_divergence` of one model.

    Args:
        row_loss: `(logits, labels) -> loss of each row`; called on chunks of kept rows with fp32 logits, soft-cap and
            scale of the head applied. Must be differentiable in the logits by autograd.
        max_scratch_bytes: as in `linear_divergence`.
    """
    check_scratch(max_scratch_bytes)
    head = Head.of(head)
    _check_linear(hidden, head, "hidden")
    labels = _checked_labels(labels, hidden.shape[:-1])
    _, (labels, hidden) = kept_rows(labels, hidden)
    rows = by_autograd(lambda logits, _, labels: row_loss(logits, labels))
    return chunked_rows(rows, hidden, head, None, None, labels, max_scratch_bytes=max_scratch_bytes)[0]


def _rows_of(logits: Tensor) -> Tensor:
    if logits.ndim == 0:
        raise ValueError("logits must be [..., vocab], got a single number")
    return logits[None].flatten(0, -2)


def _one_dtype(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype, which loses nothing; the kernels take one."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_linear(hidden: Tensor, head: Head, name: str) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} must be [tokens, {head.weight.shape[1]}] to fit its head, got {list(hidden.shape)}; "
            "flatten batch and positions first"
        )


def _checked_labels(labels: Tensor, rows: torch.Size) -> Tensor:
    if labels.shape != rows:
        raise ValueError(f"labels have shape {list(labels.shape)} but there are {list(rows)} rows")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    return labels.long()  # a gather takes no other


def _check_rows(student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"student_hidden has {student_hidden.shape[0]} rows and teacher_hidden {teacher_hidden.shape[0]}"
        )
