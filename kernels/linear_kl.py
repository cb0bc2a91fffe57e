"""KL and cross-entropy between a student's and a teacher's head, from hidden states, without holding the logits.

Training walks the tokens in chunks (`linear_chunks.py`): two GEMMs write fp32 logits, `rows.py` turns them into losses
and dlogits, and the gradients are finished in the forward pass (the loss is a sum, so backward only multiplies by one
scalar). Without gradients it does the same without them, or `linear_eval.py` runs and keeps no logits at all, whichever
is faster by its own rule. README.md has the maths.
"""

from typing import Any

import torch
from torch import Tensor

from .launch import IGNORE_INDEX, KINDS, eager, require
from .linear_chunks import Head, empty_gradients, losses_and_gradients, scaled
from .linear_eval import evaluate, fused_is_faster
from .rows import check_rows, row_strided

SCRATCH = 2 << 30  # bytes, where the caller gives no bound


def linear_kl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    kl_weight: float = 1.0,
    drop_ignored: bool = False,
    max_scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight · CE + kl_weight · T² · KL, summed over kept rows.

    Logits are softcap(scale · (hidden @ weight.T + bias)) with softcap(z) = c · tanh(z / c).

    Args:
        student_hidden, student_weight: [N, Hs], [V, Hs], of one dtype (fp32, bf16, fp16); get gradients.
        teacher_hidden, teacher_weight: [N, Ht], [Vt, Ht], of one dtype; never get gradients.
        labels: [N] int64, -100 = row ignored. None keeps every row and allows no cross-entropy.
        student_bias, teacher_bias: [V], [Vt].
        kind: "forward" KL(teacher || student), "reverse" or "jsd" (weight `beta` on the teacher).
        max_scratch_bytes: bound on the chunk of logits and dlogits. A trained head adds its workspace on top: all
            dlogits in the hidden dtype or an fp32 [V, Hs] accumulator, whichever is smaller.

    Returns:
        The loss (differentiable, fp32) and the detached sums of CE (0 without labels) and of T² · KL.
        The vocabularies are cut to the first min(V, Vt) tokens; the student's rows beyond get gradient 0.
    """
    if teacher_hidden.shape[0] != student_hidden.shape[0]:
        raise ValueError(
            f"linear_kl: both models need the same rows, found {student_hidden.shape[0]} and {teacher_hidden.shape[0]}"
        )
    if kind not in KINDS or kind == "none":
        raise ValueError(f"linear_kl: kind must be forward, reverse or jsd, found {kind!r}")
    if not temperature > 0:
        raise ValueError(f"linear_kl: temperature must be positive, found {temperature}")
    if labels is None and ce_weight != 0:
        raise ValueError("linear_kl: ce_weight needs labels")
    student = _prepare("student", student_hidden, student_weight, student_bias)
    teacher = _prepare("teacher", teacher_hidden.detach(), teacher_weight.detach(), teacher_bias)
    scalars = (student_scale, teacher_scale, student_softcap, teacher_softcap, beta, temperature, ce_weight, kl_weight)
    return _apply(student, teacher, labels, kind, scalars, drop_ignored, max_scratch_bytes)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    drop_ignored: bool = False,
    max_scratch_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of softcap(scale · (hidden @ weight.T + bias)) summed over the rows not labelled -100.

    Args:
        hidden, weight: [N, H], [V, H], of one dtype.
        labels: [N] int64, aligned with the rows.
        bias: [V].
        drop_ignored, max_scratch_bytes: see `linear_kl_divergence`.
    """
    student = _prepare("student", hidden, weight, bias)
    scalars = (scale, 1.0, softcap, None, 0.5, 1.0, 1.0, 0.0)
    return _apply(student, None, labels, "none", scalars, drop_ignored, max_scratch_bytes)[0]


def _prepare(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """Check one model's operands and cast them as autocast would cast a linear layer's."""
    require(hidden.device)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear loss: {name} hidden and weight must be [N, H] and [V, H], found {list(hidden.shape)} "
            f"and {list(weight.shape)}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"linear loss: {name} hidden is {hidden.dtype} and weight {weight.dtype}, expected one dtype")
    return row_strided(hidden), row_strided(weight), None if bias is None else bias.contiguous()


def _apply(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    kind: str,
    scalars: tuple[float | None, ...],
    drop_ignored: bool,
    max_scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = student
    labels = check_rows("linear loss", hidden.shape[0], labels)
    training = torch.is_grad_enabled()
    wanted = [training and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    arguments = (*student, *(teacher or (None, None, None)), labels, kind, *scalars, *wanted)
    run = _LinearLoss.apply if eager(hidden) else linear_loss
    loss, ce_sum, kl_sum, *_ = run(*arguments, drop_ignored and labels is not None, max_scratch_bytes or SCRATCH)
    return loss, ce_sum.detach(), kl_sum.detach()


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    kind: str,
    student_scale: float,
    teacher_scale: float,
    student_cap: float | None,
    teacher_cap: float | None,
    beta: float,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    drop_ignored: bool,
    max_scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, CE sum, KL sum, and the gradients of the loss by hidden, weight and bias (empty where not wanted)."""
    v = weight.shape[0] if teacher_weight is None else min(weight.shape[0], teacher_weight.shape[0])
    student: Head = (hidden, weight, bias)
    teacher: Head | None = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
    options: dict[str, Any] = {
        "v": v,
        "kind": kind,
        "beta": beta,
        "temperature": temperature,
        "student_scale": student_scale,
        "teacher_scale": teacher_scale,
        "student_cap": student_cap,
        "teacher_cap": teacher_cap,
    }
    wanted = (want_hidden, want_weight, want_bias)
    keep = None
    if drop_ignored and labels is not None:
        keep = (labels != IGNORE_INDEX).nonzero().flatten()
        student = (hidden[keep], weight, bias)
        teacher = None if teacher is None else (teacher[0][keep], *teacher[1:])
        labels = labels[keep]
    with torch.autocast(hidden.device.type, enabled=False):
        if not any(wanted) and fused_is_faster(student, teacher, v=v, kind=kind):
            gradients = empty_gradients(*student, *wanted)
            ce, kl = evaluate(student, teacher, labels, **options)
        else:
            weights = ce_weight, kl_weight
            ce, kl, gradients = losses_and_gradients(
                student, teacher, labels, options, *weights, wanted, max_scratch_bytes
            )
        if keep is not None and want_hidden:
            gradients = (torch.zeros_like(hidden).index_copy_(0, keep, gradients[0]), *gradients[1:])
        ce_sum = ce.sum() if labels is not None else hidden.new_zeros((), dtype=torch.float32)
        kl_sum = kl.sum() if teacher is not None else hidden.new_zeros((), dtype=torch.float32)
        loss = torch.zeros_like(ce_sum)
        if teacher is not None and kl_weight != 0:  # 0 · inf would be nan
            loss = loss + kl_weight * kl_sum
        if labels is not None and ce_weight != 0:
            loss = loss + ce_weight * ce_sum
    return loss, ce_sum, kl_sum, *gradients


linear_loss = torch.library.custom_op(
    "lightning_itk::linear_loss", _linear_loss, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@linear_loss.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    scalars = [torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(3)]
    return (*scalars, *empty_gradients(hidden, weight, bias, *rest[-5:-2]))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.wanted = inputs[-5:-2]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


@torch.autograd.function.once_differentiable
def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    """Multiply the finished gradients by the upstream scalar, in place and without reading it on the host.

    In place, because a second [V, H] is what training cannot afford; autograd's version check then turns a second
    backward through the same graph into an error. A compiled graph scales a copy if it must, and may run again.
    """
    grads: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        for i, (grad, wanted, dtype) in enumerate(zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)):
            if wanted:
                grads[i] = scaled(grad, upstream).to(dtype)
    return (*grads, *(None,) * 18)


linear_loss.register_autograd(_backward, setup_context=_setup)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _linear_loss(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)  # type: ignore[assignment]
