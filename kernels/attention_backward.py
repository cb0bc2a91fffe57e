"""The backward kernels of the attention-map loss: dq by blocks of queries, dk by blocks of keys, neither with atomics.

Both recompute the scores and take the log-sum-exps from the forward pass or from the caller. The difference of the
two maps is formed in fp32 and rounded once, for the product with keys or queries. Names are those of
`attention_forward.py`.
"""

import triton
import triton.language as tl

from .attention_forward import EMPTY, key_range, load_tile, scores, visible
from .launch import LN2, LOG2E, dot


@triton.jit
def teacher_part(lp_t, REVERSE: tl.constexpr):
    """What one teacher head adds to the sum over pairs: P_t (forward) or log2 P_t (reverse)."""
    if REVERSE:
        return lp_t
    return tl.exp2(lp_t)


@triton.jit
def dscores(x_s, lse_s, total, rows_kl, to_log2, cap, G: tl.constexpr, CAP: tl.constexpr, REVERSE: tl.constexpr):
    """Gradient by the student's scaled scores, summed over the G pairs, up to constant factors (fp32).

    total = Σ_g teacher_part; rows_kl = Σ_g RKL in log2 units (reverse only).
    """
    lp_s = x_s - lse_s
    p_s = tl.exp2(lp_s)
    ds = G * p_s - total
    if REVERSE:
        ds = p_s * (G * lp_s - total - rows_kl)
    if CAP:
        ratio = x_s / (to_log2 * cap)
        ds *= 1.0 - ratio * ratio
    return ds


@triton.jit
def attention_dq_kernel(
    qs_ptr,  # [B, Hs, S, DS]
    ks_ptr,  # [B, Hs / QS, S, DS]
    qt_ptr,  # [B, Ht, S, DT]
    kt_ptr,  # [B, Ht / QT, S, DT]
    head_map_ptr,  # [Hs, G] int32
    starts_ptr,  # [B, S] int32
    ends_ptr,  # [B, S] int32
    key_mask_ptr,  # [B, S] uint8
    row_mask_ptr,  # [B, S] uint8
    kl_ptr,  # [B, Hs, S] fp32, mean over pairs: read by REVERSE, written by EMIT
    lse_s_ptr,  # [B, Hs, S] fp32, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32, log2
    upstream_ptr,  # [] fp32
    dq_ptr,  # [B, Hs, S, DS] out, contiguous
    qs_b, qs_h, qs_s, ks_b, ks_h, ks_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s,  # strides
    S,
    window,
    scale_s,
    scale_t,
    cap_s,
    cap_t,
    to_log2,
    unit,  # factor on the scores' gradient before it is rounded to the inputs' dtype
    factor,  # factor on dq
    G: tl.constexpr,
    QS: tl.constexpr,
    QT: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ROW_MASK: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    REVERSE: tl.constexpr,
    EMIT: tl.constexpr,  # also write the rows' KL: the log-sum-exps came from the caller and no forward ran
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = first + tl.arange(0, BLOCK_M)
    row_at = (b * tl.num_programs(1) + h) * S + i
    cols = tl.arange(0, BLOCK_DS)
    dq_ptrs = dq_ptr + (row_at * DS)[:, None] + cols[None, :]
    stored = (i < S)[:, None] & (cols < DS)[None, :]
    if ROW_MASK:
        kept = tl.load(row_mask_ptr + b * S + i, mask=i < S, other=0)
        if tl.max(kept.to(tl.int32), 0) == 0:
            tl.store(dq_ptrs, tl.zeros([BLOCK_M, BLOCK_DS], dq_ptr.dtype.element_ty), mask=stored)
            if EMIT:
                tl.store(kl_ptr + row_at, tl.zeros([BLOCK_M], tl.float32), mask=i < S)
            return
    starts = i
    ends = i
    if SEGMENTS:
        starts = tl.load(starts_ptr + b * S + i, mask=i < S, other=0)
        ends = tl.load(ends_ptr + b * S + i, mask=i < S, other=0)
    ks_ptr += b * ks_b + (h // QS).to(tl.int64) * ks_h
    qt_ptr += b * qt_b
    kt_ptr += b * kt_b
    q_s = load_tile(qs_ptr + b * qs_b + h.to(tl.int64) * qs_h, i, qs_s, S, DS, BLOCK_DS, True)
    lse_s = tl.load(lse_s_ptr + row_at, mask=i < S, other=EMPTY)
    rows_kl = tl.zeros([BLOCK_M], tl.float32)
    if REVERSE:
        rows_kl = tl.load(kl_ptr + row_at, mask=i < S, other=0.0) * (G * LOG2E)
    lo, full, hi = key_range(first, i, starts, ends, S, window, CAUSAL, WINDOW, SEGMENTS, KEY_MASK, BLOCK_N)
    lse_t_ptr += (b * tl.num_programs(1) + h) * G * S
    head_map_ptr += h * G
    if G == 1:  # the teacher's queries stay on chip; with several heads they are read again per block of keys
        ht = tl.load(head_map_ptr)
        kt_ptr += (ht // QT).to(tl.int64) * kt_h
        q_t = load_tile(qt_ptr + ht.to(tl.int64) * qt_h, i, qt_s, S, DT, BLOCK_DT, True)
        lse_t = tl.load(lse_t_ptr + i, mask=i < S, other=EMPTY)

    dq = tl.zeros([BLOCK_M, BLOCK_DS], tl.float32)
    kl = tl.zeros([BLOCK_M], tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED == 0:
            begin = lo
            end = full
        else:
            begin = full
            end = hi
        for n in range(begin, end, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            k_s = load_tile(ks_ptr, j, ks_s, S, DS, BLOCK_DS, MASKED == 1)
            x_s = scores(q_s, k_s, scale_s, to_log2, cap_s, CAP_S, UPCAST)
            if MASKED == 1:
                keys = j
                if KEY_MASK:
                    keys = tl.load(key_mask_ptr + b * S + j, mask=j < S, other=0)
                seen = visible(
                    i[:, None], j[None, :], starts[:, None], ends[:, None], keys[None, :], S, window,
                    CAUSAL, WINDOW, SEGMENTS, KEY_MASK,
                )  # fmt: skip
            if G == 1:
                k_t = load_tile(kt_ptr, j, kt_s, S, DT, BLOCK_DT, MASKED == 1)
                lp_t = scores(q_t, k_t, scale_t, to_log2, cap_t, CAP_T, UPCAST) - lse_t[:, None]
                total = teacher_part(lp_t, REVERSE)
                if EMIT:
                    term = total * (lp_t - x_s + lse_s[:, None])
                    if MASKED == 1:
                        term = tl.where(seen, term, 0.0)
                    kl += tl.sum(term, 1)
            else:
                total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for g in range(0, G):
                    ht = tl.load(head_map_ptr + g)
                    q_t = load_tile(qt_ptr + ht.to(tl.int64) * qt_h, i, qt_s, S, DT, BLOCK_DT, True)
                    k_t = load_tile(kt_ptr + (ht // QT).to(tl.int64) * kt_h, j, kt_s, S, DT, BLOCK_DT, MASKED == 1)
                    lse_t = tl.load(lse_t_ptr + g * S + i, mask=i < S, other=EMPTY)
                    lp_t = scores(q_t, k_t, scale_t, to_log2, cap_t, CAP_T, UPCAST) - lse_t[:, None]
                    part = teacher_part(lp_t, REVERSE)
                    total += part
                    if EMIT:
                        term = part * (lp_t - x_s + lse_s[:, None])
                        if MASKED == 1:
                            term = tl.where(seen, term, 0.0)
                        kl += tl.sum(term, 1)
            ds = dscores(x_s, lse_s[:, None], total, rows_kl[:, None], to_log2, cap_s, G, CAP_S, REVERSE)
            if MASKED == 1:
                ds = tl.where(seen, ds, 0.0)
            dq = dot((ds * unit).to(k_s.dtype), k_s, dq, "ieee", UPCAST)

    upstream = 1.0
    if EMIT:
        tl.store(kl_ptr + row_at, kl * (LN2 / G), mask=i < S)
    else:
        upstream = tl.load(upstream_ptr).to(tl.float32)
    tl.store(dq_ptrs, (dq * (factor * upstream)).to(dq_ptr.dtype.element_ty), mask=stored)


@triton.jit
def attention_dk_kernel(
    qs_ptr,  # [B, Hs, S, DS]
    ks_ptr,  # [B, Hs / QS, S, DS]
    qt_ptr,  # [B, Ht, S, DT]
    kt_ptr,  # [B, Ht / QT, S, DT]
    head_map_ptr,  # [Hs, G] int32
    starts_ptr,  # [B, S] int32
    ends_ptr,  # [B, S] int32
    key_mask_ptr,  # [B, S] uint8
    blocks_ptr,  # [B, ceil(S / BLOCK_M)] int32, query blocks with a kept row first, in order
    ranks_ptr,  # [B, ceil(S / BLOCK_M) + 1] int32, how many kept blocks lie before each block
    kl_ptr,  # [B, Hs, S] fp32, mean over pairs (REVERSE)
    lse_s_ptr,  # [B, Hs, S] fp32, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32, log2
    upstream_ptr,  # [] fp32
    dk_ptr,  # [B, Hs / QS, S, DS] out, contiguous
    qs_b, qs_h, qs_s, ks_b, ks_h, ks_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s,  # strides
    S,
    window,
    scale_s,
    scale_t,
    cap_s,
    cap_t,
    to_log2,
    unit,
    factor,
    G: tl.constexpr,
    QS: tl.constexpr,
    QT: tl.constexpr,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ROW_MASK: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    REVERSE: tl.constexpr,
    FIXED: tl.constexpr,  # all query heads of this key head answer to one teacher key head: its keys are read once
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * QS
    j = first + tl.arange(0, BLOCK_N)
    keys = j
    if KEY_MASK:
        keys = tl.load(key_mask_ptr + b * S + j, mask=j < S, other=0)

    # Query blocks that can see these keys: [lo, hi).
    lo = 0
    hi = S
    if CAUSAL:
        lo = first
    if WINDOW:
        hi = tl.minimum(hi, first + BLOCK_N - 1 + window)
    if SEGMENTS:  # a query sees a key only inside the key's own segment
        lo = tl.maximum(lo, tl.min(tl.load(starts_ptr + b * S + j, mask=j < S, other=S), 0))
        hi = tl.minimum(hi, tl.max(tl.load(ends_ptr + b * S + j, mask=j < S, other=0), 0))
    lo = lo // BLOCK_M
    hi = tl.maximum(lo, tl.cdiv(hi, BLOCK_M))
    if ROW_MASK:
        width = tl.cdiv(S, BLOCK_M)
        lo = tl.load(ranks_ptr + b * (width + 1) + lo)
        hi = tl.load(ranks_ptr + b * (width + 1) + hi)
        blocks_ptr += b * width
    count = hi - lo

    qs_ptr += b * qs_b
    qt_ptr += b * qt_b
    kt_ptr += b * kt_b
    k_s = load_tile(ks_ptr + b * ks_b + hk.to(tl.int64) * ks_h, j, ks_s, S, DS, BLOCK_DS, True)
    if FIXED and G == 1:
        hkt = tl.load(head_map_ptr + hk * QS * G) // QT
        k_t = load_tile(kt_ptr + hkt.to(tl.int64) * kt_h, j, kt_s, S, DT, BLOCK_DT, True)

    # One loop over (query head, query block): two nested loops cost the registers that this kernel does not have.
    dk = tl.zeros([BLOCK_N, BLOCK_DS], tl.float32)
    for step in range(0, count * QS):
        h = hk * QS + step // count
        block = lo + step % count
        if ROW_MASK:
            block = tl.load(blocks_ptr + block)
        i = block * BLOCK_M + tl.arange(0, BLOCK_M)
        q_s = load_tile(qs_ptr + h.to(tl.int64) * qs_h, i, qs_s, S, DS, BLOCK_DS, True)
        row_at = (b * heads + h) * S + i
        lse_s = tl.load(lse_s_ptr + row_at, mask=i < S, other=EMPTY)
        rows_kl = tl.zeros([BLOCK_M], tl.float32)
        if REVERSE:
            rows_kl = tl.load(kl_ptr + row_at, mask=i < S, other=0.0) * (G * LOG2E)
        starts = i
        ends = i
        if SEGMENTS:
            starts = tl.load(starts_ptr + b * S + i, mask=i < S, other=0)
            ends = tl.load(ends_ptr + b * S + i, mask=i < S, other=0)
        x_s = scores(k_s, q_s, scale_s, to_log2, cap_s, CAP_S, UPCAST)
        if G == 1:
            ht = tl.load(head_map_ptr + h)
            q_t = load_tile(qt_ptr + ht.to(tl.int64) * qt_h, i, qt_s, S, DT, BLOCK_DT, True)
            lse_t = tl.load(lse_t_ptr + row_at, mask=i < S, other=EMPTY)
            if not FIXED:
                k_t = load_tile(kt_ptr + (ht // QT).to(tl.int64) * kt_h, j, kt_s, S, DT, BLOCK_DT, True)
            lp_t = scores(k_t, q_t, scale_t, to_log2, cap_t, CAP_T, UPCAST) - lse_t[None, :]
            total = teacher_part(lp_t, REVERSE)
        else:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for g in range(0, G):
                ht = tl.load(head_map_ptr + h * G + g)
                q_t = load_tile(qt_ptr + ht.to(tl.int64) * qt_h, i, qt_s, S, DT, BLOCK_DT, True)
                lse_t = tl.load(lse_t_ptr + ((b * heads + h) * G + g) * S + i, mask=i < S, other=EMPTY)
                k_t = load_tile(kt_ptr + (ht // QT).to(tl.int64) * kt_h, j, kt_s, S, DT, BLOCK_DT, True)
                lp_t = scores(k_t, q_t, scale_t, to_log2, cap_t, CAP_T, UPCAST) - lse_t[None, :]
                total += teacher_part(lp_t, REVERSE)
        ds = dscores(x_s, lse_s[None, :], total, rows_kl[None, :], to_log2, cap_s, G, CAP_S, REVERSE)
        seen = visible(
            i[None, :], j[:, None], starts[None, :], ends[None, :], keys[:, None], S, window,
            CAUSAL, WINDOW, SEGMENTS, KEY_MASK,
        )  # fmt: skip
        ds = tl.where(seen, ds, 0.0)
        dk = dot((ds * unit).to(q_s.dtype), q_s, dk, "ieee", UPCAST)

    cols = tl.arange(0, BLOCK_DS)
    at = ((b * tl.num_programs(1) + hk) * S + j) * DS
    upstream = tl.load(upstream_ptr).to(tl.float32)
    tl.store(
        dk_ptr + at[:, None] + cols[None, :],
        (dk * (factor * upstream)).to(dk_ptr.dtype.element_ty),
        mask=(j < S)[:, None] & (cols < DS)[None, :],
    )
