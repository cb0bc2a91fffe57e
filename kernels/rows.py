"""The row kernel: token losses and their gradient for rows of logits that are already in memory.

One program owns one row and walks its vocabulary in blocks, so no reduction crosses programs and results are
bit-identical from run to run. `kl.py` runs it twice (statistics, then gradient from three saved scalars);
`linear_kl.py` runs it once per chunk of tokens (loss and gradient together). The maths is in README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FORWARD, JSD, KINDS, LN2, LOG2E, LOWEST, NONE, REVERSE, architecture, guard, row_tile, soft_cap


@triton.jit
def load_logits(ptr, bias_ptr, cols, v, readable, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """One block of a row as fp32 logits: softcap(scale · (z + bias)), -inf past the end of the vocabulary."""
    inside = cols < v
    z = tl.load(ptr + cols, mask=cols < readable, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        z = soft_cap(z, cap)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def log_ratio(lp, lq):
    """log2 p - log2 q, finite: 0 where both are -inf, and clamped where the smaller one is below fp32 anyway."""
    return tl.where(lp == lq, 0.0, tl.minimum(tl.maximum(lp - lq, -126.0), 126.0))


@triton.jit
def token_loss_kernel(
    student_ptr,  # [N, V] logits of the student, before scale, bias and cap
    teacher_ptr,  # [N, Vt]
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [Vt]
    labels_ptr,  # [N] int64
    upstream_ptr,  # [N] fp32, gradient of the objective by each row's KL
    kl_ptr,  # [N] fp32 out, T² · KL
    ce_ptr,  # [N] fp32 out
    stats_ptr,  # [N, 3] fp32, log2-sum-exp of student and teacher, row constant of the gradient
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
    HAS_LABELS: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    HAS_CE: tl.constexpr,
    LOAD_STATS: tl.constexpr,
    SAVE_STATS: tl.constexpr,
    GRAD: tl.constexpr,
    CE_GRAD: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * grad_stride
    lanes = tl.arange(0, BLOCK)
    to_log2 = (1.0 / temperature) * LOG2E

    label = 0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == -100:
            if not LOAD_STATS:
                if KIND != NONE:
                    tl.store(kl_ptr + row, 0.0)
                if HAS_CE:
                    tl.store(ce_ptr + row, 0.0)
            if SAVE_STATS:
                tl.store(stats_ptr + row * 3 + tl.arange(0, 4), 0.0, mask=tl.arange(0, 4) < 3)
            if GRAD:
                for start in range(0, grad_v, BLOCK):
                    cols = start + lanes
                    tl.store(grad_ptr + cols, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=cols < grad_v)
            return

    # Pass 1: running maxima and sums in the log2 domain; `a` is the shifted accumulator of Σ p · (log2 p/q).
    lse_s = 0.0
    lse_t = 0.0
    lse_1 = 0.0
    row_constant = 0.0
    if LOAD_STATS:
        lse_s = tl.load(stats_ptr + row * 3)
        lse_t = tl.load(stats_ptr + row * 3 + 1)
        row_constant = tl.load(stats_ptr + row * 3 + 2)
    else:
        m_s = LOWEST + 0.0
        m_t = LOWEST + 0.0
        l_s = 0.0
        l_t = 0.0
        l_1 = 0.0
        a = 0.0
        for start in range(0, v, BLOCK):
            cols = start + lanes
            x_s = to_log2 * load_logits(
                student_ptr, student_bias_ptr, cols, v, readable, student_scale, student_cap, STUDENT_BIAS, STUDENT_CAP
            )
            new_s = tl.maximum(m_s, tl.max(x_s, 0))
            d_s = new_s - m_s
            u_s = x_s - new_s
            e_s = tl.exp2(u_s)
            if KIND != NONE:
                x_t = to_log2 * load_logits(
                    teacher_ptr,
                    teacher_bias_ptr,
                    cols,
                    v,
                    readable,
                    teacher_scale,
                    teacher_cap,
                    TEACHER_BIAS,
                    TEACHER_CAP,
                )
                new_t = tl.maximum(m_t, tl.max(x_t, 0))
                d_t = new_t - m_t
                u_t = x_t - new_t
                e_t = tl.exp2(u_t)
                if KIND == FORWARD:
                    a = tl.exp2(-d_t) * (a - l_t * (d_t - d_s)) + tl.sum(tl.where(e_t > 0, e_t * (u_t - u_s), 0.0), 0)
                if KIND == REVERSE:
                    a = tl.exp2(-d_s) * (a - l_s * (d_s - d_t)) + tl.sum(tl.where(e_s > 0, e_s * (u_s - u_t), 0.0), 0)
                l_t = tl.exp2(-d_t) * l_t + tl.sum(e_t, 0)
                m_t = new_t
                if HAS_CE:  # cross-entropy is at temperature 1, where the maximum is T · m_s
                    l_1 = tl.exp2(-d_s * temperature) * l_1 + tl.sum(tl.exp2(u_s * temperature), 0)
            l_s = tl.exp2(-d_s) * l_s + tl.sum(e_s, 0)
            m_s = new_s
        lse_s = m_s + tl.log2(l_s)
        if KIND == NONE:
            lse_1 = lse_s
        else:
            lse_t = m_t + tl.log2(l_t)
            if HAS_CE:
                lse_1 = m_s * temperature + tl.log2(l_1)
        if KIND == FORWARD:
            row_constant = a / l_t - tl.log2(l_t) + tl.log2(l_s)
        if KIND == REVERSE:
            row_constant = a / l_s - tl.log2(l_s) + tl.log2(l_t)
        kl = row_constant
        if KIND == JSD:  # both sums must be known before the mixture is
            to_teacher = 0.0
            to_student = 0.0
            for start in range(0, v, BLOCK):
                cols = start + lanes
                lq = -lse_s + to_log2 * load_logits(
                    student_ptr,
                    student_bias_ptr,
                    cols,
                    v,
                    readable,
                    student_scale,
                    student_cap,
                    STUDENT_BIAS,
                    STUDENT_CAP,
                )
                lp = -lse_t + to_log2 * load_logits(
                    teacher_ptr,
                    teacher_bias_ptr,
                    cols,
                    v,
                    readable,
                    teacher_scale,
                    teacher_cap,
                    TEACHER_BIAS,
                    TEACHER_CAP,
                )
                d = log_ratio(lp, lq)
                to_teacher -= tl.sum(tl.exp2(lp) * tl.log2(beta + (1 - beta) * tl.exp2(-d)), 0)
                to_student -= tl.sum(tl.exp2(lq) * tl.log2((1 - beta) + beta * tl.exp2(d)), 0)
            row_constant = to_student
            kl = beta * to_teacher + (1 - beta) * to_student
        if KIND != NONE:
            tl.store(kl_ptr + row, kl * (LN2 * temperature * temperature))
        if HAS_CE:
            known = (label >= 0) & (label < v)  # a label outside the vocabulary has probability 0: the loss is inf
            z = tl.load(student_ptr + label, mask=known, other=0.0).to(tl.float32)
            if STUDENT_BIAS:
                z += tl.load(student_bias_ptr + label, mask=known, other=0.0).to(tl.float32)
            z *= student_scale
            if STUDENT_CAP:
                z = soft_cap(z, student_cap)
            tl.store(ce_ptr + row, lse_1 * LN2 - tl.where(known, z, float("-inf")))
        if SAVE_STATS:
            tl.store(stats_ptr + row * 3, lse_s)
            tl.store(stats_ptr + row * 3 + 1, lse_t)
            tl.store(stats_ptr + row * 3 + 2, row_constant)

    # Last pass, from the end of the row backwards: what pass 1 read last is still in L2.
    if GRAD:
        factor = kl_weight * temperature  # T² of the loss, 1/T of the chain rule
        if HAS_UPSTREAM:
            factor *= tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)
        blocks = tl.cdiv(grad_v, BLOCK)
        for i in range(0, blocks):
            cols = (blocks - 1 - i) * BLOCK + lanes
            z_s = load_logits(
                student_ptr, student_bias_ptr, cols, v, readable, student_scale, student_cap, STUDENT_BIAS, STUDENT_CAP
            )
            lq = to_log2 * z_s - lse_s
            q = tl.exp2(lq)
            dz = tl.zeros([BLOCK], tl.float32)
            if KIND != NONE:
                lp = -lse_t + to_log2 * load_logits(
                    teacher_ptr,
                    teacher_bias_ptr,
                    cols,
                    v,
                    readable,
                    teacher_scale,
                    teacher_cap,
                    TEACHER_BIAS,
                    TEACHER_CAP,
                )
            if KIND == FORWARD:
                dz = factor * (q - tl.exp2(lp))
            if KIND == REVERSE:
                dz = factor * tl.where(q > 0, (q * LN2) * (lq - lp - row_constant), 0.0)
            if KIND == JSD:
                away = -tl.log2((1 - beta) + beta * tl.exp2(log_ratio(lp, lq))) - row_constant
                dz = q * away * (factor * (1 - beta) * LN2)
            if CE_GRAD:
                dz += ce_weight * (tl.exp2(z_s * LOG2E - lse_1) - tl.where(cols == label, 1.0, 0.0))
            if STUDENT_CAP:
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
    absent = student  # a pointer that a disabled branch never reads
    with guard(student):
        token_loss_kernel[(rows,)](
            student,
            absent if teacher is None else teacher,
            absent if student_bias is None else student_bias,
            absent if teacher_bias is None else teacher_bias,
            absent if labels is None else labels,
            absent if upstream is None else upstream,
            absent if kl is None else kl,
            absent if ce is None else ce,
            absent if stats is None else stats,
            absent if grad is None else grad,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            0 if grad is None else grad.stride(0),
            0 if upstream is None else upstream.stride(0),
            v,
            readable or v,
            0 if grad is None else grad.shape[1],
            float(student_scale),
            float(teacher_scale),
            float(student_cap or 1.0),
            float(teacher_cap or 1.0),
            float(temperature),
            float(beta),
            float(kl_weight),
            float(ce_weight),
            KIND=KINDS[kind],
            HAS_LABELS=labels is not None,
            HAS_UPSTREAM=upstream is not None,
            HAS_CE=ce is not None,
            LOAD_STATS=load_stats,
            SAVE_STATS=stats is not None and not load_stats,
            GRAD=grad is not None,
            CE_GRAD=grad is not None and ce is not None and ce_weight != 0,
            STUDENT_BIAS=student_bias is not None,
            TEACHER_BIAS=teacher_bias is not None,
            STUDENT_CAP=bool(student_cap),
            TEACHER_CAP=bool(teacher_cap),
            BLOCK=block,
            num_warps=warps,
        )


def row_strided(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_rows(name: str, rows: int, labels: Tensor | None) -> None:
    """One label per row, as int64."""
    if labels is not None and (labels.shape != (rows,) or labels.dtype != torch.int64):
        raise ValueError(
            f"{name}: labels must be int64 [{rows}], found {str(labels.dtype).removeprefix('torch.')} "
            f"{list(labels.shape)}"
        )
