"""The row kernel: token losses and their gradient for rows of logits that are already in memory.

One program owns one row and walks its vocabulary in blocks, so no reduction crosses programs and results are
bit-identical from run to run. `kl.py` runs it twice (statistics, then gradient from three saved scalars);
`linear_kl.py` runs it once per chunk of tokens (loss and gradient together). The maths is in README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergence import (
    divergence,
    log_probabilities,
    log_ratio,
    mixture_sums,
    online_update,
    sum_at_temperature_1,
)
from .launch import FORWARD, JSD, KINDS, LN2, LOG2E, LOWEST, NONE, REVERSE, architecture, guard, row_tile, soft_cap

STATS = tl.constexpr(5)  # what is saved of a row between its value and its gradient


@triton.jit
def load_logits(model, cols):
    """fp32 logits of one row at `cols`: softcap(scale · (z + bias)), -inf past the end of the vocabulary.

    `model` is (row, bias or None, scale, cap or None, v, readable), as `token_loss_kernel` makes it.
    """
    row_ptr, bias_ptr, scale, cap, v, readable = model
    inside = cols < v
    z = tl.load(row_ptr + cols, mask=cols < readable, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if cap is not None:
        z = soft_cap(z, cap)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def running_sums(student, teacher, lanes, v, to_log2, KIND: tl.constexpr, HAS_CE: tl.constexpr, BLOCK: tl.constexpr):
    """Pass 1: maxima of both rows; log2 of their sums and of the student's at temperature 1; the KL in bits."""
    m_s = LOWEST + 0.0  # running maxima m, sums l, and `a`, the shifted accumulator of Σ p · (log2 p/q)
    m_t = LOWEST + 0.0
    l_s = 0.0
    l_t = 0.0
    l_1 = 0.0
    a = 0.0
    for start in range(0, v, BLOCK):
        x_s = load_logits(student, start + lanes)
        x_t = x_s
        if KIND != NONE:
            x_t = load_logits(teacher, start + lanes)
        before = m_s
        m_s, l_s, m_t, l_t, a = online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, to_log2, KIND, True, 0)
        if KIND != NONE and HAS_CE:
            l_1 = sum_at_temperature_1(l_1, x_s, before, m_s, 0)
    log_s = tl.log2(l_s)
    log_t = 0.0
    log_1 = log_s  # without a KL the temperature is 1
    kl = 0.0
    if KIND != NONE:
        log_t = tl.log2(l_t)
        if HAS_CE:
            log_1 = tl.log2(l_1)
        if KIND != JSD:
            kl = divergence(a, l_s, l_t, KIND)
    return m_s, log_s, m_t, log_t, log_1, kl


@triton.jit
def mixture_divergences(student, teacher, lanes, v, to_log2, m_s, log_s, m_t, log_t, beta, BLOCK: tl.constexpr):
    """Pass 2 of JSD: KL(p || m) and KL(q || m) in bits."""
    to_teacher = 0.0
    to_student = 0.0
    for start in range(0, v, BLOCK):
        lq = log_probabilities(load_logits(student, start + lanes), m_s, log_s, to_log2, 0)
        lp = log_probabilities(load_logits(teacher, start + lanes), m_t, log_t, to_log2, 0)
        more_t, more_s = mixture_sums(lp, lq, beta, 0)
        to_teacher -= more_t
        to_student -= more_s
    return to_teacher, to_student


@triton.jit
def divergence_gradient(q, lq, lp, row_constant, factor, beta, KIND: tl.constexpr):
    """factor · gradient by a = z_s / T; `row_constant` is L or KL(q || m), all logarithms are to base 2.

    An infinite reverse KL has no gradient: with a row constant of nan it is nan.
    """
    if KIND == FORWARD:
        gradient = factor * (q - tl.exp2(lp))
    elif KIND == REVERSE:
        gradient = factor * ((q * LN2) * (tl.where(q > 0, lq - lp, 0.0) - row_constant))
    else:
        away = -tl.log2((1 - beta) + beta * tl.exp2(log_ratio(lp, lq))) - row_constant
        gradient = q * away * (factor * (1 - beta) * LN2)
    return gradient


@triton.jit
def token_loss_kernel(  # an argument that is None takes no part
    student_ptr,  # [N, V] logits of the student, before scale, bias and cap
    teacher_ptr,  # [N, Vt]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [Vt]
    labels_ptr,  # [N] int64
    upstream_ptr,  # [N] fp32, gradient of the objective by each row's KL
    kl_ptr,  # [N] fp32 out, T² · KL
    ce_ptr,  # [N] fp32 out
    stats_ptr,  # [N, 5] fp32: maximum and log2 of the sum, of the student and the teacher; the gradient's row constant
    grad_ptr,  # [N, V] out, gradient by the student's logits
    student_stride,
    teacher_stride,
    grad_stride,
    upstream_stride,
    v,  # common vocabulary
    readable,  # columns that may be loaded, >= v: a multiple of 16 keeps the loads wide where v is not one
    grad_v,  # columns of grad; zero beyond v
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    temperature,
    beta,
    kl_weight,
    ce_weight,
    KIND: tl.constexpr,
    LOAD_STATS: tl.constexpr,  # read stats instead of writing them
    CE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)  # one for every pass: a range of its own costs the gradient 11 registers
    label = 0
    if grad_ptr is not None:
        grad_ptr += row * grad_stride
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        if label == -100:
            if not LOAD_STATS:
                if kl_ptr is not None:
                    tl.store(kl_ptr + row, 0.0)
                if ce_ptr is not None:
                    tl.store(ce_ptr + row, 0.0)
                if stats_ptr is not None:
                    tl.store(stats_ptr + row * STATS + tl.arange(0, 8), 0.0, mask=tl.arange(0, 8) < STATS)
            if grad_ptr is not None:
                for start in range(0, grad_v, BLOCK):
                    cols = start + lanes
                    tl.store(grad_ptr + cols, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=cols < grad_v)
            return

    student = (student_ptr + row * student_stride, student_bias_ptr, student_scale, student_cap, v, readable)
    teacher = student  # not read
    if KIND != NONE:
        teacher = (teacher_ptr + row * teacher_stride, teacher_bias_ptr, teacher_scale, teacher_cap, v, readable)
    to_log2 = (1.0 / temperature) * LOG2E
    if LOAD_STATS:
        m_s = tl.load(stats_ptr + row * STATS)
        log_s = tl.load(stats_ptr + row * STATS + 1)
        m_t = tl.load(stats_ptr + row * STATS + 2)
        log_t = tl.load(stats_ptr + row * STATS + 3)
        row_constant = tl.load(stats_ptr + row * STATS + 4)
    else:
        HAS_CE: tl.constexpr = ce_ptr is not None
        m_s, log_s, m_t, log_t, log_1, kl = running_sums(student, teacher, lanes, v, to_log2, KIND, HAS_CE, BLOCK)
        row_constant = kl
        if KIND == REVERSE:
            row_constant = tl.where(kl == float("inf"), float("nan"), kl)
        if KIND == JSD:
            to_teacher, to_student = mixture_divergences(
                student, teacher, lanes, v, to_log2, m_s, log_s, m_t, log_t, beta, BLOCK
            )
            row_constant = to_student + 0.0 * to_teacher  # nan where the teacher's logits are
            kl = beta * to_teacher + (1 - beta) * to_student
        if kl_ptr is not None:
            tl.store(kl_ptr + row, kl * (LN2 * temperature * temperature))
        if ce_ptr is not None:  # a label outside the vocabulary has probability 0: the loss is inf
            z_label = load_logits(student, tl.where(label < 0, v, label))
            tl.store(ce_ptr + row, log_1 * LN2 - (z_label - m_s))
        if stats_ptr is not None:
            tl.store(stats_ptr + row * STATS, m_s)
            tl.store(stats_ptr + row * STATS + 1, log_s)
            tl.store(stats_ptr + row * STATS + 2, m_t)
            tl.store(stats_ptr + row * STATS + 3, log_t)
            tl.store(stats_ptr + row * STATS + 4, row_constant)

    if grad_ptr is not None:
        factor = kl_weight * temperature  # T² of the loss, 1/T of the chain rule
        if upstream_ptr is not None:
            factor *= tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        blocks = tl.cdiv(grad_v, BLOCK)
        for i in range(0, blocks):  # from the end of the row backwards: what was read last comes first
            cols = (blocks - 1 - i) * BLOCK + lanes
            z_s = load_logits(student, cols)
            dz = tl.zeros([BLOCK], tl.float32)
            if KIND != NONE:
                lq = log_probabilities(z_s, m_s, log_s, to_log2, 0)
                q = tl.exp2(lq)
                lp = log_probabilities(load_logits(teacher, cols), m_t, log_t, to_log2, 0)
                dz = divergence_gradient(q, lq, lp, row_constant, factor, beta, KIND)
            if CE_GRAD:
                dz += ce_weight * (
                    tl.exp2(log_probabilities(z_s, m_s, log_1, LOG2E, 0)) - tl.where(cols == label, 1.0, 0.0)
                )
            if student_cap is not None:
                ratio = z_s / student_cap
                dz *= 1.0 - ratio * ratio
            dz = tl.where(cols < v, dz * student_scale, 0.0)
            tl.store(grad_ptr + cols, dz.to(grad_ptr.dtype.element_ty), mask=cols < grad_v)


def token_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    *,
    v: int,
    readable: int | None = None,
    kind: str,
    beta: float,
    temperature: float,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    kl: Tensor | None = None,
    ce: Tensor | None = None,
    upstream: Tensor | None = None,
    stats: Tensor | None = None,
    load_stats: bool = False,
    grad: Tensor | None = None,
) -> None:
    """Launch the row kernel over `student` [N, >= v] and write into whichever of `kl`, `ce`, `stats`, `grad` are given.

    `readable` says that both rows of logits have that many columns in memory, of which the first `v` count.
    A gradient from saved statistics (`load_stats`) covers the KL term only.
    """
    rows = student.shape[0]
    if rows == 0:
        return
    block, warps = row_tile(architecture(student.device))
    with guard(student):
        token_loss_kernel[(rows,)](
            student, teacher, student_bias, teacher_bias, labels, upstream, kl, ce, stats, grad,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            0 if grad is None else grad.stride(0),
            0 if upstream is None else upstream.stride(0),
            v,
            readable or v,
            0 if grad is None else grad.shape[1],
            float(student_scale),
            float(teacher_scale),
            float(student_cap) if student_cap else None,
            float(teacher_cap) if teacher_cap else None,
            float(temperature),
            float(beta),
            float(kl_weight),
            float(ce_weight),
            KIND=KINDS[kind],
            LOAD_STATS=load_stats,
            CE_GRAD=grad is not None and ce is not None and ce_weight != 0,
            BLOCK=block,
            num_warps=warps,
        )  # fmt: skip


def row_strided(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_rows(name: str, rows: int, labels: Tensor | None) -> Tensor | None:
    """One label per row, as int64; contiguous, as the kernels read them."""
    if labels is None:
        return None
    if labels.shape != (rows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: labels must be int64 [{rows}], found {str(labels.dtype).removeprefix('torch.')} "
            f"{list(labels.shape)}"
        )
    return labels.contiguous()
