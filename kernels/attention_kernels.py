"""The three kernels of the attention-map loss: forward rows, dq, dk. Scores live in registers only; see README.md.

Names: i indexes queries and j keys of one sequence; x are scores in the log2 domain, x = score · log2(e) / T, so that
probabilities are 2^(x - lse). A *pair* is one student head with one of the G teacher heads that it answers to.
A row that is masked out, or sees no key, has lse = EMPTY: then every probability is 0 and the row drops out of all sums.
"""

import triton
import triton.language as tl

from .launch import LN2, LOG2E, LOWEST, dot, soft_cap

EMPTY = tl.constexpr(1.0e30)
HIDDEN = tl.constexpr(-2.0e30)  # below LOWEST: 2^(HIDDEN - m) is 0 even before any key was seen


@triton.jit
def load_tile(ptr, rows, stride, S, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """[len(rows), BLOCK_D]; zero where a row is beyond S (checked if BOUNDED) and beyond D."""
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
    if BOUNDED and D < BLOCK_D:
        return tl.load(ptrs, mask=(rows < S)[:, None] & (cols < D)[None, :], other=0.0)
    if BOUNDED:
        return tl.load(ptrs, mask=(rows < S)[:, None], other=0.0)
    if D < BLOCK_D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def scores(a, b, scale, to_log2, cap, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr):
    """softcap(scale · a @ b.T) · to_log2 as fp32 [len(a), len(b)]."""
    x = dot(a, b.T, tl.zeros([a.shape[0], b.shape[0]], tl.float32), "ieee", UPCAST)
    if HAS_CAP:
        return soft_cap(x * scale, cap) * to_log2
    return x * (scale * to_log2)


@triton.jit
def visible(
    i,  # queries, broadcastable against j
    j,  # keys
    starts,  # first key of each query's segment, shaped like i
    ends,  # end of it
    keys,  # key mask, shaped like j
    S,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr,
):
    """Whether query i sees key j."""
    seen = (j < S) & (i < S)
    if CAUSAL:
        seen = seen & (j <= i)
    if WINDOW:
        seen = seen & (j > i - window)
    if SEGMENTS:
        seen = seen & (j >= starts) & (j < ends)
    if KEY_MASK:
        seen = seen & (keys != 0)
    return seen


@triton.jit
def key_range(
    first, rows, starts, ends, S, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, KEY_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(lo, full, hi): keys [lo, hi) can be seen by the queries `rows`, blocks before `full` need no mask."""
    lo = 0
    hi = S
    if CAUSAL:
        hi = tl.minimum(S, tl.max(rows, 0) + 1)
    if WINDOW:
        lo = tl.maximum(lo, first - window + 1)
    if SEGMENTS:
        lo = tl.maximum(lo, tl.min(tl.where(rows < S, starts, S), 0))
        hi = tl.minimum(hi, tl.max(tl.where(rows < S, ends, 0), 0))
    lo = (lo // BLOCK_N) * BLOCK_N
    full = (S // BLOCK_N) * BLOCK_N
    if CAUSAL:
        full = ((first + 1) // BLOCK_N) * BLOCK_N
    if WINDOW or SEGMENTS or KEY_MASK:
        full = lo
    return lo, full, hi


@triton.jit
def online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, REVERSE: tl.constexpr):
    """One block of keys added to the running maxima, sums and shifted divergence of every row."""
    new_s = tl.maximum(m_s, tl.max(x_s, 1))
    new_t = tl.maximum(m_t, tl.max(x_t, 1))
    d_s = new_s - m_s
    d_t = new_t - m_t
    u_s = x_s - new_s[:, None]
    u_t = x_t - new_t[:, None]
    e_s = tl.exp2(u_s)
    e_t = tl.exp2(u_t)
    if REVERSE:
        a = tl.exp2(-d_s) * (a - l_s * (d_s - d_t)) + tl.sum(e_s * (u_s - u_t), 1)
    else:
        a = tl.exp2(-d_t) * (a - l_t * (d_t - d_s)) + tl.sum(e_t * (u_t - u_s), 1)
    l_s = tl.exp2(-d_s) * l_s + tl.sum(e_s, 1)
    l_t = tl.exp2(-d_t) * l_t + tl.sum(e_t, 1)
    return new_s, l_s, new_t, l_t, a


@triton.jit
def attention_forward_kernel(
    qs_ptr,  # [B, Hs, S, DS]
    ks_ptr,  # [B, Hs / QS, S, DS]
    qt_ptr,  # [B, Ht, S, DT]
    kt_ptr,  # [B, Ht / QT, S, DT]
    head_map_ptr,  # [Hs, G] int32, teacher heads of each student head
    starts_ptr,  # [B, S] int32, segment of each token
    ends_ptr,  # [B, S] int32
    key_mask_ptr,  # [B, S] uint8
    row_mask_ptr,  # [B, S] uint8
    kl_ptr,  # [B, Hs, G, S] fp32 out
    lse_s_ptr,  # [B, Hs, S] fp32 out, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32 out, log2
    qs_b, qs_h, qs_s, ks_b, ks_h, ks_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s,  # strides
    S,
    window,
    scale_s,
    scale_t,
    cap_s,
    cap_t,
    to_log2,
    G: tl.constexpr,
    QS: tl.constexpr,  # student query heads per key head
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
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest causal rows start first
    pair = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    h = pair // G
    i = first + tl.arange(0, BLOCK_M)
    row_at = (b * tl.num_programs(1) + pair) * S + i
    lse_s_at = (b * (tl.num_programs(1) // G) + h) * S + i
    kept = i < S
    if ROW_MASK:
        kept = tl.load(row_mask_ptr + b * S + i, mask=i < S, other=0) != 0
        if tl.max(kept.to(tl.int32), 0) == 0:
            tl.store(kl_ptr + row_at, tl.zeros([BLOCK_M], tl.float32), mask=i < S)
            tl.store(lse_t_ptr + row_at, tl.full([BLOCK_M], EMPTY, tl.float32), mask=i < S)
            tl.store(lse_s_ptr + lse_s_at, tl.full([BLOCK_M], EMPTY, tl.float32), mask=(i < S) & (pair % G == 0))
            return
    starts = i
    ends = i
    if SEGMENTS:
        starts = tl.load(starts_ptr + b * S + i, mask=i < S, other=0)
        ends = tl.load(ends_ptr + b * S + i, mask=i < S, other=0)
    ht = tl.load(head_map_ptr + pair)
    ks_ptr += b * ks_b + (h // QS).to(tl.int64) * ks_h
    kt_ptr += b * kt_b + (ht // QT).to(tl.int64) * kt_h
    q_s = load_tile(qs_ptr + b * qs_b + h.to(tl.int64) * qs_h, i, qs_s, S, DS, BLOCK_DS, True)
    q_t = load_tile(qt_ptr + b * qt_b + ht.to(tl.int64) * qt_h, i, qt_s, S, DT, BLOCK_DT, True)
    lo, full, hi = key_range(first, i, starts, ends, S, window, CAUSAL, WINDOW, SEGMENTS, KEY_MASK, BLOCK_N)

    m_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_t = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    l_t = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    for n in range(lo, full, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k_s = load_tile(ks_ptr, j, ks_s, S, DS, BLOCK_DS, False)
        x_s = scores(q_s, k_s, scale_s, to_log2, cap_s, CAP_S, UPCAST)
        k_t = load_tile(kt_ptr, j, kt_s, S, DT, BLOCK_DT, False)
        x_t = scores(q_t, k_t, scale_t, to_log2, cap_t, CAP_T, UPCAST)
        m_s, l_s, m_t, l_t, a = online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, REVERSE)
    for n in range(full, hi, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        keys = j
        if KEY_MASK:
            keys = tl.load(key_mask_ptr + b * S + j, mask=j < S, other=0)
        seen = visible(
            i[:, None], j[None, :], starts[:, None], ends[:, None], keys[None, :], S, window,
            CAUSAL, WINDOW, SEGMENTS, KEY_MASK,
        )  # fmt: skip
        k_s = load_tile(ks_ptr, j, ks_s, S, DS, BLOCK_DS, True)
        x_s = scores(q_s, k_s, scale_s, to_log2, cap_s, CAP_S, UPCAST)
        k_t = load_tile(kt_ptr, j, kt_s, S, DT, BLOCK_DT, True)
        x_t = scores(q_t, k_t, scale_t, to_log2, cap_t, CAP_T, UPCAST)
        x_s = tl.where(seen, x_s, HIDDEN)
        x_t = tl.where(seen, x_t, HIDDEN)
        m_s, l_s, m_t, l_t, a = online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, REVERSE)

    kept = kept & (l_t > 0) & (l_s > 0)
    l_s = tl.where(kept, l_s, 1.0)
    l_t = tl.where(kept, l_t, 1.0)
    log_s = tl.log2(l_s)
    log_t = tl.log2(l_t)
    if REVERSE:
        kl = a / l_s - log_s + log_t
    else:
        kl = a / l_t - log_t + log_s
    tl.store(kl_ptr + row_at, tl.where(kept, kl * LN2, 0.0), mask=i < S)
    tl.store(lse_t_ptr + row_at, tl.where(kept, m_t + log_t, EMPTY), mask=i < S)
    tl.store(lse_s_ptr + lse_s_at, tl.where(kept, m_s + log_s, EMPTY), mask=(i < S) & (pair % G == 0))


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
    if REVERSE:
        ds = p_s * (G * lp_s - total - rows_kl)
    else:
        ds = G * p_s - total
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
