"""KL, reverse KL and Jensen-Shannon between rows of logits, with the gradient recomputed from five scalars per row.

kl_divergence   the sum over kept rows
kl_rows         one value per row, so that every row can carry its own upstream gradient; optionally in place
"""

from typing import Any

import torch
from torch import Tensor

from .launch import KINDS, require
from .rows import STATS, check_rows, row_strided, token_loss


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over kept rows of T² · divergence; see `kl_rows` for arguments and shapes."""
    return kl_rows(student_logits, teacher_logits, labels, kind=kind, beta=beta, temperature=temperature).sum()


def kl_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    in_place: bool = False,
) -> Tensor:
    """T² · divergence of every row.

    Args:
        student_logits: [N, V] in fp32, bf16 or fp16; any row stride. Only the student gets a gradient.
        teacher_logits: [N, Vt]; the columns beyond min(V, Vt) of either side take no part.
        labels: [N] int64; rows labelled -100 have value 0 and gradient 0. None keeps every row.
        kind: "forward" KL(teacher || student), "reverse" KL(student || teacher) or "jsd" (`beta` weighs the teacher).
        temperature: divides both logits; the value carries T².
        in_place: backward overwrites `student_logits` with its gradient instead of allocating [N, V]. For callers who
            own the logits and read them nowhere else; not for torch.compile.

    Returns:
        fp32 [N].
    """
    require(student_logits.device)
    labels = _check(student_logits, teacher_logits, labels, kind, temperature)
    student, teacher = row_strided(student_logits), row_strided(teacher_logits.detach())
    if in_place and student is student_logits:
        return _InPlace.apply(student, teacher, labels, kind, float(beta), float(temperature))
    return kl_forward(student, teacher, labels, kind, float(beta), float(temperature))[0]


def _check(student: Tensor, teacher: Tensor, labels: Tensor | None, kind: str, temperature: float) -> Tensor | None:
    """Refuse what does not fit; the labels, contiguous."""
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"kl: logits must be [N, V] and [N, Vt], found {list(student.shape)} and {list(teacher.shape)}"
        )
    if kind not in KINDS or kind == "none":
        raise ValueError(f"kl: kind must be forward, reverse or jsd, found {kind!r}")
    if not temperature > 0:
        raise ValueError(f"kl: temperature must be positive, found {temperature}")
    return check_rows("kl", student.shape[0], labels)


@torch.library.custom_op("lightning_itk::kl_forward", mutates_args=())
def kl_forward(
    student: Tensor, teacher: Tensor, labels: Tensor | None, kind: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Values [N] and the statistics [N, 5] from which the gradient is recomputed."""
    kl = student.new_empty(student.shape[0], dtype=torch.float32)
    stats = student.new_empty(student.shape[0], STATS.value, dtype=torch.float32)
    _launch(student, teacher, labels, kind, beta, temperature, kl=kl, stats=stats)
    return kl, stats


@kl_forward.register_fake
def _(student, teacher, labels, kind, beta, temperature):  # type: ignore[no-untyped-def]
    n = student.shape[0]
    return student.new_empty(n, dtype=torch.float32), student.new_empty(n, STATS.value, dtype=torch.float32)


@torch.library.custom_op("lightning_itk::kl_backward", mutates_args=())
def kl_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    kind: str,
    beta: float,
    temperature: float,
) -> Tensor:
    """Gradient [N, V] by the student's logits, given one upstream gradient per row."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    options = (kind, beta, temperature)
    _launch(student, teacher, labels, *options, upstream=upstream, stats=stats, load_stats=True, grad=grad)
    return grad


@kl_backward.register_fake
def _(upstream, student, teacher, labels, stats, kind, beta, temperature):  # type: ignore[no-untyped-def]
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _launch(student: Tensor, teacher: Tensor, labels: Tensor | None, *options: Any, **arguments: Any) -> None:
    """The row kernel over the common vocabulary; `options` are kind, beta and temperature."""
    names = dict(zip(("kind", "beta", "temperature"), options, strict=True))
    token_loss(student, teacher, labels, v=min(student.shape[1], teacher.shape[1]), **names, **arguments)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    student, teacher, labels, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, labels, output[1])


def _backward(ctx, upstream, _stats):  # type: ignore[no-untyped-def]
    if upstream is None:
        return (None,) * 6
    return kl_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


kl_forward.register_autograd(_backward, setup_context=_setup)


class _InPlace(torch.autograd.Function):
    """`kl_forward` whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, student, teacher, labels, *options):  # type: ignore[no-untyped-def]
        kl, stats = kl_forward(student, teacher, labels, *options)
        ctx.save_for_backward(student, teacher, labels, stats)
        ctx.options, ctx.spent = options, False
        return kl

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        if ctx.spent:
            raise RuntimeError("kl_rows(in_place=True): a second backward would read overwritten logits")
        ctx.spent = True
        student, teacher, labels, stats = ctx.saved_tensors
        grad = student.detach()
        torch.autograd.graph.increment_version(student)  # whoever saved these logits for its own backward must notice
        _launch(student, teacher, labels, *ctx.options, upstream=upstream, stats=stats, load_stats=True, grad=grad)
        return grad, None, None, None, None, None
