"""The linear losses in torch as one operator: what torch.compile sees is a call that it neither opens nor breaks at.

Which rows are kept is only known when the operator runs, so they are picked inside it. The gradients are finished in
the forward pass and saved; backward multiplies them by one number. Eager code calls the same functions as an
`autograd.Function`: torch takes 0.1 ms to call an operator of so many arguments.
"""

from functools import partial

import torch
from torch import Tensor

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.losses.chunked import ChunkLoss, losses_and_gradients, scaled
from lightning_itk.losses.divergence import Divergence, distillation_loss, label_loss_and_gradient, log_softmax
from lightning_itk.losses.head import Head, matmul_dtype


def linear_parts(
    hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor | None,
    how: Divergence | None,
    *,
    drop_ignored: bool,
    max_scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (differentiable once), sum of CE and sum of T² · divergence over the kept rows, for arguments that fit.

    Args:
        hidden, student: [N, H], and its head; both heads are cut to the common vocabulary.
        teacher_hidden, teacher: [N, Ht]; None for a cross-entropy alone.
        labels: int64 [N]; None keeps every row, and CE is 0.
        how: None for a cross-entropy alone.
        drop_ignored: whether a label may be -100.
    """
    weights = student.weight, student.bias
    dtypes = [matmul_dtype(hidden, student.weight)] * 2  # as autocast is now: the operator may run when it is off
    teacher_arguments: tuple[Tensor | float | None, ...] = (None, None, None, 1.0, None)
    if teacher is not None and teacher_hidden is not None:
        dtypes[1] = matmul_dtype(teacher_hidden, teacher.weight)
        teacher_arguments = (teacher_hidden, *teacher)
    training = torch.is_grad_enabled()
    wanted = [training and x is not None and x.requires_grad for x in (hidden, *weights)]
    kind, numbers = "none", (0.0, 1.0, 1.0, 0.0)
    if how is not None:
        kind, numbers = how.kind, (how.beta, how.temperature, how.ce_weight, how.kl_weight)
    loss, ce, kl, *_ = (chunked_loss if torch.compiler.is_compiling() else _ChunkedLoss.apply)(
        hidden, *student, *teacher_arguments, labels, kind, *numbers, drop_ignored, *dtypes, max_scratch_bytes, *wanted
    )
    return loss, ce, kl


def _chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    labels: Tensor | None,
    kind: str,
    beta: float,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    drop_ignored: bool,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    max_scratch_bytes: int | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, CE, T² · divergence and the gradients of the loss by hidden, weight and bias (empty where not wanted)."""
    student, teacher = Head(weight, bias, scale, softcap).prepared(hidden, dtype), None
    row_loss: ChunkLoss = _ce_rows
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head(teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
        teacher = teacher.prepared(teacher_hidden, teacher_dtype)
        how = Divergence(kind, beta, temperature, ce_weight, kl_weight)  # type: ignore[arg-type]
        row_loss = partial(distillation_loss, how=how, has_labels=labels is not None)
    rows, keep, targets = hidden, None, labels
    if targets is None:
        targets = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    elif drop_ignored:
        keep, (targets, rows, *others) = kept_rows(targets, hidden, *(x for x in (teacher_hidden,) if x is not None))
        teacher_hidden = others[0] if others else None
    loss, sums, gradients = losses_and_gradients(
        row_loss,
        rows,
        student,
        teacher_hidden,
        teacher,
        targets,
        parts=2,
        wanted=(want_hidden, want_weight, want_bias),
        max_scratch_bytes=max_scratch_bytes,
    )
    if keep is not None and gradients[0] is not None:
        gradients = (torch.zeros_like(hidden).index_copy_(0, keep, gradients[0]), *gradients[1:])
    # Copies, because an operator's results may not share memory.
    d_hidden, d_weight, d_bias = (loss.new_empty(0) if g is None else g for g in gradients)
    return loss, sums[0].clone(), sums[1].clone(), d_hidden, d_weight, d_bias


def kept_rows(labels: Tensor, *rows: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Where labels are not -100, and labels and rows of these; nothing is copied where that is everywhere (None)."""
    keep = (labels != IGNORE_INDEX).nonzero().flatten()
    everything = labels, *rows
    return (None, everything) if len(keep) == len(labels) else (keep, tuple(x[keep] for x in everything))


def _ce_rows(
    student: Tensor, teacher: Tensor | None, labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    total, gradient = label_loss_and_gradient(log_softmax(student), labels, with_gradient)
    return total, torch.stack([total, torch.zeros_like(total)]), gradient


chunked_loss = torch.library.custom_op(
    "lightning_itk::chunked_loss", _chunked_loss, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@chunked_loss.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    want_hidden, want_weight, want_bias = rest[-3:]
    nothing = hidden.new_empty(0, dtype=wide)
    return (
        *(hidden.new_empty((), dtype=wide) for _ in range(3)),
        torch.empty_like(hidden) if want_hidden else nothing,
        torch.empty_like(weight, dtype=wide) if want_weight else torch.empty_like(nothing),
        torch.empty_like(bias, dtype=wide) if want_bias else torch.empty_like(nothing),
    )


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.wanted, ctx.dtypes = inputs[-3:], [None if x is None else x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


@torch.autograd.function.once_differentiable
def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 20
    if upstream is None:
        return None, None, None, *nothing
    saved = zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    return *(scaled(g, upstream, dtype) if wanted else None for g, wanted, dtype in saved), *nothing


chunked_loss.register_autograd(_backward, setup_context=_setup)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _chunked_loss(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)  # type: ignore[assignment]
