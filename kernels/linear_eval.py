"""The no-gradient path of the linear losses: logits are made tile by tile and never leave the chip.

Each program owns a block of rows and a slice of the vocabulary and keeps running maxima and sums; the slices are merged
afterwards by a fixed formula, so the result does not depend on the order in which programs ran. Memory is a few fp32
values per row and slice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    FORWARD,
    IGNORE_INDEX,
    INTERPRET,
    KINDS,
    LN2,
    LOG2E,
    LOWEST,
    NONE,
    REVERSE,
    architecture,
    dot,
    eval_tile,
    guard,
    precision,
    soft_cap,
)
from .rows import log_ratio

FIELDS = 7  # m_s, l_s, m_t, l_t, a, l_1, label logit; the mixture sweep uses the first two for its sums


@triton.jit
def logits_tile(
    x_ptr,  # [N, H]
    w_ptr,  # [V, H]
    bias_ptr,  # [V]
    rows,  # [BLOCK_M] int64
    cols,  # [BLOCK_N]
    x_stride,
    w_stride,
    width,  # H
    v,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """fp32 logits [BLOCK_M, BLOCK_N], -inf past the end of the vocabulary."""
    lanes = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows * x_stride)[:, None] + lanes[None, :]
    w_ptrs = w_ptr + (tl.minimum(cols, v - 1).to(tl.int64) * w_stride)[:, None] + lanes[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptrs + k)
            w = tl.load(w_ptrs + k)
        else:
            inside = (lanes + k < width)[None, :]
            x = tl.load(x_ptrs + k, mask=inside, other=0.0)
            w = tl.load(w_ptrs + k, mask=inside, other=0.0)
        acc = dot(x, w.T, acc, PRECISION, UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < v, other=0.0).to(tl.float32)[None, :]
    acc *= scale
    if HAS_CAP:
        acc = soft_cap(acc, cap)
    return tl.where((cols < v)[None, :], acc, float("-inf"))


@triton.jit
def linear_eval_kernel(
    xs_ptr,  # [N, Hs] student hidden states
    ws_ptr,  # [V, Hs]
    bs_ptr,  # [V]
    xt_ptr,  # [N, Ht] teacher hidden states
    wt_ptr,  # [Vt, Ht]
    bt_ptr,  # [Vt]
    order_ptr,  # [N] int64, rows with kept ones first
    labels_ptr,  # [N] int64
    lse_ptr,  # [2, N] fp32, log2-sum-exp of student and teacher (mixture sweep only)
    out_ptr,  # [splits, FIELDS, N] fp32
    xs_stride,
    ws_stride,
    xt_stride,
    wt_stride,
    n,
    v,
    student_width,
    teacher_width,
    tiles_per_split,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    temperature,
    beta,
    KIND: tl.constexpr,
    MIXTURE: tl.constexpr,  # the second sweep of JSD
    HAS_LABELS: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    EVEN_S: tl.constexpr,
    EVEN_T: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION_S: tl.constexpr,
    PRECISION_T: tl.constexpr,
    UPCAST: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    live = index < n
    rows = tl.load(order_ptr + index, mask=live, other=0)
    labels = tl.full([BLOCK_M], -1, tl.int64)
    if HAS_LABELS:
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
    if MIXTURE:
        m_s = tl.load(lse_ptr + rows, mask=live, other=0.0)
        m_t = tl.load(lse_ptr + n + rows, mask=live, other=0.0)

    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tl.cdiv(v, BLOCK_N))):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = logits_tile(
            xs_ptr, ws_ptr, bs_ptr, rows, cols, xs_stride, ws_stride, student_width, v, student_scale, student_cap,
            STUDENT_BIAS, STUDENT_CAP, EVEN_S, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION_S, UPCAST,
        )  # fmt: skip
        if HAS_LABELS and not MIXTURE:
            label_logit += tl.sum(tl.where(cols[None, :] == labels[:, None], z, 0.0), 1)
        x_s = z * to_log2
        if KIND != NONE:
            x_t = to_log2 * logits_tile(
                xt_ptr, wt_ptr, bt_ptr, rows, cols, xt_stride, wt_stride, teacher_width, v, teacher_scale, teacher_cap,
                TEACHER_BIAS, TEACHER_CAP, EVEN_T, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION_T, UPCAST,
            )  # fmt: skip
        if MIXTURE:
            lq = x_s - m_s[:, None]
            lp = x_t - m_t[:, None]
            d = log_ratio(lp, lq)
            l_s -= tl.sum(tl.exp2(lp) * tl.log2(beta + (1 - beta) * tl.exp2(-d)), 1)
            l_t -= tl.sum(tl.exp2(lq) * tl.log2((1 - beta) + beta * tl.exp2(d)), 1)
        else:
            new_s = tl.maximum(m_s, tl.max(x_s, 1))
            d_s = new_s - m_s
            u_s = x_s - new_s[:, None]
            e_s = tl.exp2(u_s)
            if KIND != NONE:
                new_t = tl.maximum(m_t, tl.max(x_t, 1))
                d_t = new_t - m_t
                u_t = x_t - new_t[:, None]
                e_t = tl.exp2(u_t)
                if KIND == FORWARD:
                    term = tl.where(e_t > 0, e_t * (u_t - u_s), 0.0)
                    a = tl.exp2(-d_t) * (a - l_t * (d_t - d_s)) + tl.sum(term, 1)
                if KIND == REVERSE:
                    term = tl.where(e_s > 0, e_s * (u_s - u_t), 0.0)
                    a = tl.exp2(-d_s) * (a - l_s * (d_s - d_t)) + tl.sum(term, 1)
                l_t = tl.exp2(-d_t) * l_t + tl.sum(e_t, 1)
                m_t = new_t
                if HAS_LABELS:
                    l_1 = tl.exp2(-d_s * temperature) * l_1 + tl.sum(tl.exp2(u_s * temperature), 1)
            l_s = tl.exp2(-d_s) * l_s + tl.sum(e_s, 1)
            m_s = new_s

    out_ptr += split.to(tl.int64) * FIELDS * n + rows
    if MIXTURE:
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
    xs, ws, bs = student
    xt, wt, bt = teacher if teacher is not None else (xs, ws, bs)
    n, device = xs.shape[0], xs.device
    if n == 0:
        nothing = torch.zeros(0, dtype=torch.float32, device=device)
        return nothing, nothing.clone()
    arch = architecture(device)
    plain = kind in ("forward", "reverse") and bs is None and bt is None and not (student_cap or teacher_cap)
    block_m, block_n, block_k, warps, stages = eval_tile(arch, max(xs.element_size(), xt.element_size()), plain)
    kept = torch.ones(n, dtype=torch.bool, device=device) if labels is None else labels != IGNORE_INDEX
    order = torch.argsort(~kept, stable=True)
    tiles = triton.cdiv(v, block_n)
    per_split = triton.cdiv(tiles, _splits(device, triton.cdiv(n, block_m), tiles))
    splits = triton.cdiv(tiles, per_split)
    absent = xs

    def sweep(lse: Tensor | None) -> Tensor:
        out = torch.empty(splits, FIELDS, n, dtype=torch.float32, device=device)
        with guard(xs):
            linear_eval_kernel[(triton.cdiv(n, block_m), splits)](
                xs, ws, absent if bs is None else bs, xt, wt, absent if bt is None else bt,
                order, order if labels is None else labels, out if lse is None else lse, out,
                xs.stride(0), ws.stride(0), xt.stride(0), wt.stride(0), n, v, xs.shape[1], xt.shape[1], per_split,
                float(student_scale), float(teacher_scale), float(student_cap or 1.0), float(teacher_cap or 1.0),
                float(temperature), float(beta),
                KIND=KINDS[kind], MIXTURE=lse is not None, HAS_LABELS=labels is not None,
                STUDENT_BIAS=bs is not None, TEACHER_BIAS=bt is not None,
                STUDENT_CAP=bool(student_cap), TEACHER_CAP=bool(teacher_cap),
                EVEN_S=xs.shape[1] % block_k == 0, EVEN_T=xt.shape[1] % block_k == 0, FIELDS=FIELDS,
                BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
                PRECISION_S=precision(arch, xs.dtype), PRECISION_T=precision(arch, xt.dtype), UPCAST=INTERPRET,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return torch.where(kept, out, 0.0)

    m_s, l_s, m_t, l_t, a, l_1, z = sweep(None).unbind(1)  # each [splits, N]
    top_s, top_t = m_s.amax(0), m_t.amax(0)
    d_s, d_t = top_s - m_s, top_t - m_t
    sum_s, sum_t = (l_s * torch.exp2(-d_s)).sum(0), (l_t * torch.exp2(-d_t)).sum(0)
    lse_s, lse_t = top_s + sum_s.log2(), top_t + sum_t.log2()
    kl = torch.zeros(n, dtype=torch.float32, device=device)
    if kind == "forward":
        kl = (torch.exp2(-d_t) * (a - l_t * (d_t - d_s))).sum(0) / sum_t - sum_t.log2() + sum_s.log2()
    elif kind == "reverse":
        kl = (torch.exp2(-d_s) * (a - l_s * (d_s - d_t))).sum(0) / sum_s - sum_s.log2() + sum_t.log2()
    elif kind == "jsd":
        mixed = sweep(torch.stack([lse_s, lse_t])).sum(0)
        kl = beta * mixed[0] + (1 - beta) * mixed[1]
    ce = torch.zeros_like(kl)
    if labels is not None:
        lse_1 = lse_s
        if kind != "none":
            lse_1 = top_s * temperature + (l_1 * torch.exp2(-d_s * temperature)).sum(0).log2()
        known = (labels >= 0) & (labels < v)
        ce = LN2.value * lse_1 - torch.where(known, z.sum(0), float("-inf"))
    zero = torch.zeros_like(kl)
    return torch.where(kept, ce, zero), torch.where(kept, kl * (LN2.value * temperature**2), zero)


def _splits(device: torch.device, row_blocks: int, tiles: int) -> int:
    """Slices of the vocabulary: enough programs for four waves, so that the last one is not mostly idle."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(tiles, triton.cdiv(4 * processors, row_blocks)))
