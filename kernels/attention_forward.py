"""The forward kernel of the attention-map loss, and what it shares with the backward kernels. Maths in README.md.

Scores live in registers only.

Names: i indexes queries and j keys of one sequence; x are scores in the log2 domain, x = score · log2(e) / T, so that
probabilities are 2^(x - lse). A *pair* is one student head with one of the G teacher heads that it answers to.
A row that is masked out, or sees no key, has lse = EMPTY: then every probability is 0 and the row drops out.
"""

import triton
import triton.language as tl

from .launch import LN2, LOWEST, dot, soft_cap

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
    kl = a / l_t - log_t + log_s
    if REVERSE:
        kl = a / l_s - log_s + log_t
    tl.store(kl_ptr + row_at, tl.where(kept, kl * LN2, 0.0), mask=i < S)
    tl.store(lse_t_ptr + row_at, tl.where(kept, m_t + log_t, EMPTY), mask=i < S)
    tl.store(lse_s_ptr + lse_s_at, tl.where(kept, m_s + log_s, EMPTY), mask=(i < S) & (pair % G == 0))
