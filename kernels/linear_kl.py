"""KL and cross-entropy between a student's and a teacher's head, from hidden states, without holding the logits.

Training walks the tokens in chunks (`chunks.py`): two GEMMs write fp32 logits, `rows.py` turns them into losses and
dlogits, and the gradients are finished in the forward pass (the loss is a sum, so backward only multiplies by one
scalar). Without gradients `linear_eval.py` runs instead and keeps no logits at all. README.md has the maths.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .chunks import plan_chunks
from .gemm import matmul
from .launch import KINDS, require
from .linear_eval import evaluate
from .rows import check_rows, row_strided, token_loss

SCRATCH = 2 << 30
_BLOCK = 1 << 24  # elements that are scaled at a time


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
    max_scratch_bytes: int = SCRATCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight · CE + kl_weight · T² · KL, summed over kept rows.

    Logits are softcap(scale · (hidden @ weight.T + bias)) with softcap(z) = c · tanh(z / c). Every row that is passed
    in costs its GEMMs: knowing how many rows are kept would need a host synchronisation, so callers drop ignored rows
    first (the no-gradient path does it itself).

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
    return _apply(student, teacher, labels, kind, scalars, max_scratch_bytes)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    max_scratch_bytes: int = SCRATCH,
) -> Tensor:
    """Cross-entropy of softcap(scale · (hidden @ weight.T + bias)) summed over the rows not labelled -100.

    Args:
        hidden, weight: [N, H], [V, H], of one dtype.
        labels: [N] int64, aligned with the rows.
        bias: [V].
    """
    student = _prepare("student", hidden, weight, bias)
    scalars = (scale, 1.0, softcap, None, 0.5, 1.0, 1.0, 0.0)
    return _apply(student, None, labels, "none", scalars, max_scratch_bytes)[0]


Head = tuple[Tensor, Tensor, Tensor | None]  # hidden [N, H], weight [V, H], bias [V]


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
    max_scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = student
    labels = check_rows("linear loss", hidden.shape[0], labels)
    training = torch.is_grad_enabled()
    wanted = [training and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, ce_sum, kl_sum, *_ = linear_loss(
        *student, *(teacher or (None, None, None)), labels, kind, *scalars, *wanted, max_scratch_bytes
    )
    return loss, ce_sum.detach(), kl_sum.detach()


@torch.library.custom_op("lightning_itk::linear_loss", mutates_args=())
def linear_loss(
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
    gradients = _empty_gradients(hidden, weight, bias, *wanted)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.shape[0] == 0 or not any(wanted):
            ce, kl = evaluate(student, teacher, labels, **options)
            gradients[1].zero_()
        else:
            ce, kl = _losses_and_gradients(
                student, teacher, labels, options, ce_weight, kl_weight, wanted, gradients, max_scratch_bytes
            )
        ce_sum = ce.sum() if labels is not None else hidden.new_zeros((), dtype=torch.float32)
        kl_sum = kl.sum() if teacher is not None else hidden.new_zeros((), dtype=torch.float32)
        loss = torch.zeros_like(ce_sum)
        if teacher is not None and kl_weight != 0:  # 0 · inf would be nan
            loss = loss + kl_weight * kl_sum
        if labels is not None and ce_weight != 0:
            loss = loss + ce_weight * ce_sum
    return loss, ce_sum, kl_sum, *gradients


def _losses_and_gradients(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,
    options: dict[str, Any],
    ce_weight: float,
    kl_weight: float,
    wanted: tuple[bool, bool, bool],
    gradients: tuple[Tensor, Tensor, Tensor],
    max_scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] and T² · KL [N]; fills the wanted ones of d_hidden [N, H], d_weight [V, H] and d_bias [V]."""
    hidden, weight, bias = student
    want_hidden, want_weight, want_bias = wanted
    d_hidden, d_weight, d_bias = gradients
    (n, width), v, item = hidden.shape, options["v"], hidden.element_size()
    rows, columns, keep = plan_chunks(
        n, v, width, item, teacher=teacher is not None, trains_head=want_weight, max_scratch_bytes=max_scratch_bytes
    )
    # fp16 loses dlogits below 6e-8, so they are stored in units that put the largest near 1000.
    unit = 1.0
    if hidden.dtype == torch.float16:
        largest = max(abs(kl_weight) * options["temperature"], abs(ce_weight)) * abs(options["student_scale"])
        unit = largest / 1024 or 1.0
    empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    heads = (student,) if teacher is None else (student, teacher)
    logits = [empty(rows, columns) for _ in heads]
    dlogits = empty(n if keep else rows, columns, dtype=hidden.dtype)
    accumulator = empty(v, width) if want_weight and not keep else None
    ce, kl = empty(n), empty(n)

    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        size = chunk.stop - start
        for (x, w, _), z in zip(heads, logits, strict=True):
            matmul(x[chunk], w[:v].t(), z[:size, :v])
        dz = dlogits[chunk] if keep else dlogits[:size]
        token_loss(
            logits[0][:size],
            None if teacher is None else logits[1][:size],
            None if labels is None else labels[chunk],
            student_bias=bias,
            teacher_bias=None if teacher is None else teacher[2],
            kl_weight=kl_weight / unit,
            ce_weight=ce_weight / unit,
            kl=None if teacher is None else kl[chunk],
            ce=None if labels is None else ce[chunk],
            grad=dz,
            readable=columns,
            **options,
        )
        dz = dz[:, :v]
        if want_bias:
            d_bias[:v] += dz.sum(0, dtype=torch.float32)
        if want_hidden and not keep:
            matmul(dz, weight[:v], d_hidden[chunk], unit, wide=True)
        if accumulator is not None:
            matmul(dz.t(), hidden[chunk], accumulator, accumulate=start > 0)

    if keep and want_hidden:
        matmul(dlogits[:, :v], weight[:v], d_hidden, unit, wide=True)
    if keep:
        matmul(dlogits[:, :v].t(), hidden, d_weight[:v], unit)
    elif accumulator is not None:
        d_weight[:v] = accumulator if unit == 1 else accumulator.mul_(unit)
    d_weight[v:].zero_()
    d_bias *= unit
    return ce, kl


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Storage for the gradients, of no elements where not wanted."""
    exact = torch.float32 if weight.dtype == torch.float16 else weight.dtype  # sums over tokens overflow fp16
    d_hidden = torch.empty(hidden.shape if want_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.empty(weight.shape if want_weight else (0,), dtype=exact, device=hidden.device)
    d_bias = torch.zeros(weight.shape[0] if want_bias else 0, dtype=torch.float32, device=hidden.device)
    return d_hidden, d_weight, d_bias


@linear_loss.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    scalars = [torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(3)]
    return (*scalars, *_empty_gradients(hidden, weight, bias, *rest[-4:-1]))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.wanted = inputs[-4:-1]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    """Multiply the finished gradients by the upstream scalar, in place and without reading it on the host.

    In place, because a second [V, H] is what training cannot afford; autograd's version check then turns a second
    backward through the same graph into an error.
    """
    grads: list[Tensor | None] = [None, None, None]
    if upstream is not None:
        for i, (grad, wanted, dtype) in enumerate(zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)):
            if wanted:
                grads[i] = scale_in_place(grad, upstream).to(dtype)
    return (*grads, *(None,) * 17)


def scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """grad · factor, rounded once: `mul_` would first round an fp32 factor to a grad of half precision."""
    if grad.element_size() > 2:
        return grad.mul_(factor)
    for block in grad.split(max(1, _BLOCK // max(1, grad[:1].numel()))):  # an fp32 copy of all of it does not fit
        block.copy_(block.float() * factor)
    return grad


linear_loss.register_autograd(_backward, setup_context=_setup)
