"""The plain design that the attention kernel has to beat: one pass per log-sum-exp, then one kernel with atomics.

Every tile up to the diagonal is visited, dq is summed in registers and dk goes to memory with atomic additions in fp32,
so dk differs in its last bits from run to run. No tuning, no window skipping.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def _scores(q_ptr, k_ptr, b, h, rows, cols, S, H, K, scale, doc_ptr, window, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    q_offsets = ((b * H + h) * S + rows)[:, None].to(tl.int64) * D + d[None, :]
    k_offsets = ((b * K + h // (H // K)) * S + cols)[:, None].to(tl.int64) * D + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(rows < S)[:, None] & (d < D)[None, :], other=0.0)
    k = tl.load(k_ptr + k_offsets, mask=(cols < S)[:, None] & (d < D)[None, :], other=0.0)
    doc_q = tl.load(doc_ptr + b * S + rows, mask=rows < S, other=-1)
    doc_k = tl.load(doc_ptr + b * S + cols, mask=cols < S, other=-2)
    distance = rows[:, None] - cols[None, :]
    seen = (distance >= 0) & (distance < window) & (doc_q[:, None] == doc_k[None, :])
    return tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -1.0e30), q, k


@triton.jit
def lse_kernel(q_ptr, k_ptr, doc_ptr, lse_ptr, S, H, K, scale, window, D: tl.constexpr, BLOCK_D: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    m, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = m * M + tl.arange(0, M)
    top = tl.full([M], -1.0e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(0, tl.minimum((m + 1) * M, S), N):
        cols = start + tl.arange(0, N)
        x, _, _ = _scores(q_ptr, k_ptr, b, h, rows, cols, S, H, K, scale, doc_ptr, window, D, BLOCK_D)
        new = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.where(x > -1.0e29, tl.exp(x - new[:, None]), 0.0), 1)
        top = new
    tl.store(lse_ptr + (b * H + h) * S + rows, top + tl.log(total), mask=rows < S)


@triton.jit
def loss_kernel(qs, ks, qt, kt, doc_ptr, lse_s, lse_t, weight_ptr, kl_ptr, dq_ptr, dk_ptr, S, H, KS, KT, scale_s,
                scale_t, window, DS: tl.constexpr, DT: tl.constexpr, BLOCK_DS: tl.constexpr, BLOCK_DT: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    m, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = m * M + tl.arange(0, M)
    row = (b * H + h) * S + rows
    ls = tl.load(lse_s + row, mask=rows < S, other=0.0)
    lt = tl.load(lse_t + row, mask=rows < S, other=0.0)
    weight = tl.load(weight_ptr + b * S + rows, mask=rows < S, other=0.0)
    d = tl.arange(0, BLOCK_DS)
    dq = tl.zeros([M, BLOCK_DS], tl.float32)
    kl = tl.zeros([M], tl.float32)
    for start in range(0, tl.minimum((m + 1) * M, S), N):
        cols = start + tl.arange(0, N)
        x_s, q, k = _scores(qs, ks, b, h, rows, cols, S, H, KS, scale_s, doc_ptr, window, DS, BLOCK_DS)
        x_t, _, _ = _scores(qt, kt, b, h, rows, cols, S, H, KT, scale_t, doc_ptr, window, DT, BLOCK_DT)
        seen = x_s > -1.0e29
        log_s, log_t = x_s - ls[:, None], x_t - lt[:, None]
        p_s = tl.where(seen, tl.exp(log_s), 0.0)
        p_t = tl.where(seen, tl.exp(log_t), 0.0)
        kl += tl.sum(tl.where(seen, p_t * (log_t - log_s), 0.0), 1)
        ds = ((p_s - p_t) * weight[:, None]).to(q.dtype)
        dq += tl.dot(ds, k)
        dk = tl.dot(tl.trans(ds), q) * scale_s
        where = ((b * KS + h // (H // KS)) * S + cols)[:, None].to(tl.int64) * DS + d[None, :]
        tl.atomic_add(dk_ptr + where, dk, mask=(cols < S)[:, None] & (d < DS)[None, :])
    tl.store(kl_ptr + row, kl * weight, mask=rows < S)
    tl.store(
        dq_ptr + row[:, None].to(tl.int64) * DS + d[None, :], dq * scale_s, mask=(rows < S)[:, None] & (d < DS)[None, :]
    )


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, doc, weight, window):  # type: ignore[no-untyped-def]
        b, h, s, ds = q_s.shape
        dt = q_t.shape[-1]
        m, n = (16, 16) if INTERPRET else (64, 32)
        grid = (triton.cdiv(s, m), h, b)
        pads = [max(16, triton.next_power_of_2(d)) for d in (ds, dt)]
        lse_s, lse_t, kl = (q_s.new_empty(b, h, s, dtype=torch.float32) for _ in range(3))
        scales = ds**-0.5, dt**-0.5
        lse_kernel[grid](q_s, k_s, doc, lse_s, s, h, k_s.shape[1], scales[0], window, ds, pads[0], m, n)
        lse_kernel[grid](q_t, k_t, doc, lse_t, s, h, k_t.shape[1], scales[1], window, dt, pads[1], m, n)
        dq, dk = torch.empty_like(q_s), torch.zeros_like(k_s, dtype=torch.float32)
        stages = 2 if max(pads) > 128 else 3  # what fits the shared memory of an H100
        loss_kernel[grid](q_s, k_s, q_t, k_t, doc, lse_s, lse_t, weight, kl, dq, dk, s, h, k_s.shape[1], k_t.shape[1],
                          *scales, window, ds, dt, *pads, m, n, num_stages=stages)  # fmt: skip
        ctx.save_for_backward(dq, dk)
        ctx.dtype = k_s.dtype
        return kl.sum()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        dq, dk = ctx.saved_tensors
        return (dq * upstream).to(dq.dtype), (dk * upstream).to(ctx.dtype), None, None, None, None, None


def plain_attention_kl(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, doc: Tensor, row_mask: Tensor, window: int | None
) -> Tensor:
    """Sum over kept rows of the mean over heads of KL(teacher map || student map); causal, as many heads on both sides.

    Args:
        doc: int32 [B, S], the document of each token; tokens see their own document only.
        row_mask: bool [B, S].
    """
    q_s, k_s, q_t, k_t = (x.contiguous() for x in (q_s, k_s, q_t, k_t))
    weight = row_mask.float() / q_s.shape[1]
    return _Plain.apply(q_s, k_s, q_t.detach(), k_t.detach(), doc.contiguous(), weight, window or q_s.shape[2])
