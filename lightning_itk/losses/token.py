"""Token losses as pure functions: tensors in, one sum out.

Every function returns the SUM over its kept rows; the caller divides by the count that it knows to be right (see
`InstructionModule`). Softmaxes are taken in fp32 whatever the inputs: logits rounded to bf16 ruin the distillation
gradient near convergence. Shapes: N rows (tokens), H hidden size, V vocabulary.

The `linear_*` functions take hidden states and heads instead of logits, go through the rows in chunks, and make the
gradients on the way, so nothing of size N x V outlives a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.losses.chunked import Head, by_autograd, chunked_rows
from lightning_itk.losses.divergence import Divergence, Kind, distillation_loss, label_loss_and_gradient
from lightning_itk.losses.implementation import Impl, resolve_impl


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
        labels, student, teacher = _kept(labels, student, teacher)
    row_loss = partial(distillation_loss, how=how, has_labels=False)
    return chunked_rows(row_loss, student, None, teacher, None, labels, parts=2)[0]


def linear_cross_entropy(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"] | Head,
    labels: Int[Tensor, " N"],
    *,
    impl: Impl = "auto",
    has_ignored: bool = True,
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy of `hidden @ head.T` over the rows whose label is not -100, without the logits.

    Args:
        hidden: the head's input.
        head: its weight, or a `Head` with bias, scale and soft-cap.
        labels: already aligned with the rows (shifted).
        has_ignored: False = no label is -100, as in `batch.response_rows`; saves looking, which waits for a GPU.
    """
    head = Head.of(head)
    _check_linear(hidden, head, "hidden")
    labels = _checked_labels(labels, hidden.shape[:-1])
    if has_ignored:
        labels, hidden = _kept(labels, hidden)
    if resolve_impl(impl, hidden) == "triton":
        from lightning_itk.kernels.linear_kl import linear_cross_entropy as fused

        hidden, weight = _one_dtype(hidden, head.weight)
        return fused(hidden, weight, labels, bias=head.bias, scale=head.scale, softcap=head.softcap)
    return chunked_rows(_ce_rows, hidden, head, None, None, labels)[0]


def _ce_rows(
    student: Tensor, teacher: Tensor | None, labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    total, gradient = label_loss_and_gradient(torch.log_softmax(student, -1), labels, with_gradient)
    return total, total[None], gradient


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

    Raises:
        ValueError: shapes that do not belong together, a cross-entropy without labels, or a bad option.
    """
    how = Divergence(kind, beta, temperature, ce_weight, kl_weight)
    return linear_kl_parts(student_hidden, student_head, teacher_hidden, teacher_head, labels, how, impl=impl).loss


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
    **fields: Any,
) -> LossParts:
    """`linear_kl_divergence` with its two ingredients beside it, from the same pass. CE is 0 where labels are None.

    Args:
        how: the divergence; its fields may be given by name instead.
        has_ignored: False = no label is -100, as in `batch.response_rows`; saves looking, which waits for a GPU.
    """
    how = Divergence(**fields) if how is None else how
    student, teacher = Head.of(student_head), Head.of(teacher_head)
    _check_linear(student_hidden, student, "student_hidden")
    _check_linear(teacher_hidden, teacher, "teacher_hidden")
    _check_rows(student_hidden, teacher_hidden)
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    has_labels = labels is not None
    if labels is not None:
        labels = _checked_labels(labels, student_hidden.shape[:-1])
        if has_ignored:
            labels, student_hidden, teacher_hidden = _kept(labels, student_hidden, teacher_hidden)
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
                **vars(how),
            )
        )
    if labels is None:
        labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    row_loss = partial(distillation_loss, how=how, has_labels=has_labels)
    loss, parts = chunked_rows(
        row_loss, student_hidden, student.cut(vocab), teacher_hidden, teacher.cut(vocab), labels, parts=2
    )
    return LossParts(loss, parts[0], parts[1])


def linear_divergence(
    row_loss: Callable[[Float[Tensor, "n V"], Float[Tensor, "n V"], Int[Tensor, " n"]], Float[Tensor, " n"]],
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"] | Head,
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_head: Float[Tensor, "Vt Ht"] | Head,
    labels: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """Sum over kept rows of any loss between student and teacher logits, without holding the logits.

    Args:
        row_loss: `(student_logits, teacher_logits, labels) -> loss of each row`; called on chunks of kept rows with
            fp32 logits over the common vocabulary. Must be differentiable in the student's logits by autograd.
    """
    student, teacher = Head.of(student_head), Head.of(teacher_head).detach()
    _check_linear(student_hidden, student, "student_hidden")
    _check_linear(teacher_hidden, teacher, "teacher_hidden")
    _check_rows(student_hidden, teacher_hidden)
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    labels = _checked_labels(labels, student_hidden.shape[:-1])
    labels, student_hidden, teacher_hidden = _kept(labels, student_hidden, teacher_hidden.detach())

    def rows(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return row_loss(student, teacher, labels)

    heads = student.cut(vocab), teacher.cut(vocab)
    return chunked_rows(by_autograd(rows), student_hidden, heads[0], teacher_hidden, heads[1], labels)[0]


def linear_loss(
    row_loss: Callable[[Float[Tensor, "n V"], Int[Tensor, " n"]], Float[Tensor, " n"]],
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"] | Head,
    labels: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """Sum over kept rows of any loss of a row of logits, without holding the logits: `linear_divergence` of one model.

    Args:
        row_loss: `(logits, labels) -> loss of each row`; called on chunks of kept rows with fp32 logits, soft-cap and
            scale of the head applied. Must be differentiable in the logits by autograd.
    """
    head = Head.of(head)
    _check_linear(hidden, head, "hidden")
    labels = _checked_labels(labels, hidden.shape[:-1])
    labels, hidden = _kept(labels, hidden)
    rows = by_autograd(lambda logits, _, labels: row_loss(logits, labels))
    return chunked_rows(rows, hidden, head, None, None, labels)[0]


def _rows_of(logits: Tensor) -> Tensor:
    if logits.ndim == 0:
        raise ValueError("logits must be [..., vocab], got a single number")
    return logits[None].flatten(0, -2)


def _kept(labels: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Labels and rows without the ignored ones; nothing is copied where there are none."""
    keep = (labels != IGNORE_INDEX).nonzero().flatten()
    return (labels, *rows) if len(keep) == len(labels) else tuple(x[keep] for x in (labels, *rows))


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
