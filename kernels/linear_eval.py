"""The no-gradient path of the linear losses: logits are made tile by tile and never leave the chip.

Each program owns a block of rows and a slice of the vocabulary and keeps running maxima and sums; the slices are merged
afterwards by a fixed formula, so the result does not depend on the order in which programs ran. Memory is a few fp32
values per row and slice.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergence import log_probabilities, mixture_sums, online_update, sum_at_temperature_1
from .launch import (
    IGNORE_INDEX,
    KINDS,
    LN2,
    LOG2E,
    LOWEST,
    NONE,
    TINY,
    architecture,
    dot,
    eval_tile,
    guard,
    precision,
    soft_cap,
)

FIELDS = tl.constexpr(7)  # m_s, l_s, m_t, l_t, a, l_1, label logit; the mixture sweep uses the first two for its sums


class EvalHead(NamedTuple):
    """One model's hidden states and head, as the kernel takes them: what is None takes no part."""

    x: Any  # [N, H]
    w: Any  # [V, H]
    bias: Any  # [V]
    x_stride: Any
    w_stride: Any
    width: Any  # H
    scale: Any
    cap: Any
    EVEN: Any  # BLOCK_K divides H
    PRECISION: Any


@triton.jit
def logits_tile(head, rows, cols, v, BLOCK_K: tl.constexpr):
    """fp32 logits [len(rows), len(cols)], -inf past the end of the vocabulary."""
    lanes = tl.arange(0, BLOCK_K)
    x_ptrs = head.x + (rows * head.x_stride)[:, None] + lanes[None, :]
    w_ptrs = head.w + (tl.minimum(cols, v - 1).to(tl.int64) * head.w_stride)[:, None] + lanes[None, :]
    acc = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for k in range(0, head.width, BLOCK_K):
        if head.EVEN:
            x = tl.load(x_ptrs + k)
            w = tl.load(w_ptrs + k)
        else:
            inside = (lanes + k < head.width)[None, :]
            x = tl.load(x_ptrs + k, mask=inside, other=0.0)
            w = tl.load(w_ptrs + k, mask=inside, other=0.0)
        acc = dot(x, w.T, acc, head.PRECISION)
    if head.bias is not None:
        acc += tl.load(head.bias + cols, mask=cols < v, other=0.0).to(tl.float32)[None, :]
    acc *= head.scale
    if head.cap is not None:
        acc = soft_cap(acc, head.cap)
    return tl.where((cols < v)[None, :], acc, float("-inf"))


@triton.jit
def linear_eval_kernel(
    student,  # EvalHead
    teacher,  # EvalHead
    order_ptr,  # [N] int64, rows with kept ones first
    labels_ptr,  # [N] int64, or None
    stats_ptr,  # [4, N] fp32, maximum and log2 of the sum of student and teacher: given, JSD's second sweep
    out_ptr,  # [splits, FIELDS, N] fp32
    n,
    v,
    tiles_per_split,
    temperature,
    beta,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    live = index < n
    rows = tl.load(order_ptr + index, mask=live, other=0)
    if labels_ptr is not None:
        labels = tl.load(labels_ptr + rows, mask=live, other=-100)
        live = live & (labels != -100)
        if tl.max(live.to(tl.int32), 0) == 0:
            return
    to_log2 = (1.0 / temperature) * LOG2E
    m_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_t = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    l_t = tl.zeros([BLOCK_M], tl.float32)
    l_1 = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    label_logit = tl.zeros([BLOCK_M], tl.float32)
    log_s = m_s
    log_t = m_t
    if stats_ptr is not None:
        m_s = tl.load(stats_ptr + rows, mask=live, other=0.0)
        log_s = tl.load(stats_ptr + n + rows, mask=live, other=0.0)
        m_t = tl.load(stats_ptr + 2 * n + rows, mask=live, other=0.0)
        log_t = tl.load(stats_ptr + 3 * n + rows, mask=live, other=0.0)

    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tl.cdiv(v, BLOCK_N))):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        x_s = logits_tile(student, rows, cols, v, BLOCK_K)
        if labels_ptr is not None and stats_ptr is None:
            label_logit += tl.sum(tl.where(cols[None, :] == labels[:, None], x_s, 0.0), 1)
        x_t = x_s
        if KIND != NONE:
            x_t = logits_tile(teacher, rows, cols, v, BLOCK_K)
        if stats_ptr is not None:
            lp = log_probabilities(x_t, m_t, log_t, to_log2, 1)
            lq = log_probabilities(x_s, m_s, log_s, to_log2, 1)
            more_t, more_s = mixture_sums(lp, lq, beta, 1)
            l_s -= more_t
            l_t -= more_s
        else:
            before = m_s
            m_s, l_s, m_t, l_t, a = online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, to_log2, KIND, True, 1)
            if KIND != NONE and labels_ptr is not None:
                l_1 = sum_at_temperature_1(l_1, x_s, before, m_s, 1)

    out_ptr += split.to(tl.int64) * FIELDS * n + rows
    if stats_ptr is not None:
        tl.store(out_ptr, l_s, mask=live)
        tl.store(out_ptr + n, l_t, mask=live)
    else:
        tl.store(out_ptr, m_s, mask=live)
        tl.store(out_ptr + n, l_s, mask=live)
        tl.store(out_ptr + 2 * n, m_t, mask=live)
        tl.store(out_ptr + 3 * n, l_t, mask=live)
        tl.store(out_ptr + 4 * n, a, mask=live)
        tl.store(out_ptr + 5 * n, l_1, mask=live)
        tl.store(out_ptr + 6 * n, label_logit, mask=live)


# What `fused_is_faster` reckons with: an H200's rates per second, and how near products come to the first.
_FLOPS, _BYTES, _EXPONENTIALS = 790e12, 4.3e12, 3.7e12
_CUBLAS = 0.9
_FED = {128: 27 / 64, 64: 27 / 96}  # of a 128 x N tile: bytes per clock and SM that L2 gives, of those it needs


def fused_is_faster(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    *,
    v: int,
    kind: str,
) -> bool:
    """Whether `evaluate` should take less time than chunks of cuBLAS and the row kernel: a model, nothing measured.

    Both are reckoned per word of the vocabulary; README.md has the formulas and what comes out. fp32 stays here on
    NVIDIA: three TF32 products run on tensor cores, cuBLAS's fp32 does not.
    """
    (n, _), item = student[0].shape, student[0].element_size()
    arch = architecture(student[0].device)
    if n == 0 or (item == 4 and precision(arch, student[0].dtype) == "tf32x3"):
        return True
    models = [student] if teacher is None else [student, teacher]
    width = sum(weight.shape[1] for _, weight, _ in models)
    sweeps = 2 if kind == "jsd" else 1
    reading = width * item / _BYTES  # the heads themselves, once
    rows = triton.cdiv(n, 128) * 128
    fed = _FED[64 if kind in ("jsd", "none") else 128]
    fused = sweeps * max(2 * rows * width / (fed * _FLOPS), reading)
    fused += n * len(models) * (1 + 3 * (sweeps - 1)) / _EXPONENTIALS
    chunked = max(2 * n * width / (_CUBLAS * _FLOPS), reading)
    chunked += n * len(models) * 4 * (1 + sweeps) / _BYTES  # fp32 logits are written once and read in every pass
    return fused < chunked


def evaluate(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None] | None,
    labels: Tensor | None,
    *,
    v: int,
    kind: str,
    beta: float,
    temperature: float,
    student_scale: float,
    teacher_scale: float,
    student_cap: float | None,
    teacher_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] and T² · divergence [N], 0 on ignored rows; each is 0 throughout where it is undefined."""
    xs, _, bs = student
    teacher = teacher or student  # not read
    n, device = xs.shape[0], xs.device
    if n == 0:
        nothing = torch.zeros(0, dtype=torch.float32, device=device)
        return nothing, nothing.clone()
    arch = architecture(device)
    plain = kind in ("forward", "reverse") and bs is None and teacher[2] is None and not (student_cap or teacher_cap)
    block_m, block_n, block_k, warps, stages = eval_tile(arch, max(xs.element_size(), teacher[0].element_size()), plain)
    kept = torch.ones(n, dtype=torch.bool, device=device) if labels is None else labels != IGNORE_INDEX
    order = torch.argsort(~kept, stable=True)
    tiles = triton.cdiv(v, block_n)
    per_split = triton.cdiv(tiles, _splits(device, triton.cdiv(n, block_m), tiles))
    splits = triton.cdiv(tiles, per_split)
    heads = [
        EvalHead(
            x, w, bias, x.stride(0), w.stride(0), x.shape[1], float(scale), float(cap) if cap else None,
            tl.constexpr(x.shape[1] % block_k == 0), tl.constexpr(precision(arch, x.dtype)),
        )
        for (x, w, bias), scale, cap in ((student, student_scale, student_cap), (teacher, teacher_scale, teacher_cap))
    ]  # fmt: skip

    def sweep(stats: Tensor | None) -> Tensor:
        out = torch.empty(splits, FIELDS.value, n, dtype=torch.float32, device=device)
        with guard(xs):
            linear_eval_kernel[(triton.cdiv(n, block_m), splits)](
                *heads, order, labels, stats, out, n, v, per_split, float(temperature), float(beta),
                KIND=KINDS[kind], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return torch.where(kept, out, 0.0)

    m_s, l_s, m_t, l_t, a, l_1, z = sweep(None).unbind(1)  # each [splits, N]
    top_s, top_t = m_s.amax(0), m_t.amax(0)
    d_s, d_t = ((top - m) * (LOG2E.value / temperature) for top, m in ((top_s, m_s), (top_t, m_t)))
    e_s, e_t = torch.exp2(-d_s), torch.exp2(-d_t)
    sum_s, sum_t = (l_s * e_s).sum(0), (l_t * e_t).sum(0)
    kl = torch.zeros(n, dtype=torch.float32, device=device)
    if kind == "forward":
        kl = (e_t.clamp_min(TINY.value) * (a - l_t * (d_t - d_s))).sum(0) / sum_t + (sum_s / sum_t).log2()
    elif kind == "reverse":
        kl = (e_s.clamp_min(TINY.value) * (a - l_s * (d_s - d_t))).sum(0) / sum_s + (sum_t / sum_s).log2()
    elif kind == "jsd":
        mixed = sweep(torch.stack([top_s, sum_s.log2(), top_t, sum_t.log2()])).sum(0)
        kl = beta * mixed[0] + (1 - beta) * mixed[1]
    ce = torch.zeros_like(kl)
    if labels is not None:
        sum_1 = sum_s
        if kind != "none":
            sum_1 = (l_1 * torch.exp2((m_s - top_s) * LOG2E.value)).sum(0)
        known = (labels >= 0) & (labels < v)
        ce = LN2.value * sum_1.log2() - (torch.where(known, z.sum(0), float("-inf")) - top_s)
    zero = torch.zeros_like(kl)
    return torch.where(kept, ce, zero), torch.where(kept, kl * (LN2.value * temperature**2), zero)


def _splits(device: torch.device, row_blocks: int, tiles: int) -> int:
    """Slices of the vocabulary: enough programs for four waves, so that the last one is not mostly idle."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(tiles, triton.cdiv(4 * processors, row_blocks)))
