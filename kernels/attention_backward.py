"""The backward kernels of the attention-map loss: dq by blocks of queries, dk by blocks of keys, neither with atomics.

Both recompute the scores and take the log-sum-exps from the forward pass or from the caller. The difference of the
two maps is formed in fp32 and rounded once, for the product with keys or queries. Names are those of
`attention_forward.py`.
"""

import triton
import triton.language as tl

from .attention_forward import (
    EMPTY,
    key_range,
    keys_of,
    load_key_mask,
    load_keys,
    load_queries,
    load_segments,
    scores,
    visible,
)
from .launch import LN2, LOG2E, REVERSE, dot


@triton.jit
def load_statistics(kl_ptr, lse_s_ptr, row_at, inside, G: tl.constexpr, KIND: tl.constexpr):
    """The student's log-sum-exps of some rows and, for reverse KL, the sums of their pairs' KL in log2 units."""
    lse_s = tl.load(lse_s_ptr + row_at, mask=inside, other=EMPTY)
    rows_kl = tl.zeros(inside.shape, tl.float32)
    if KIND == REVERSE:
        rows_kl = tl.load(kl_ptr + row_at, mask=inside, other=0.0) * (G * LOG2E)
    return lse_s, rows_kl


@triton.jit
def load_teacher(teacher, b, head_ptr, i, S):
    """Where a teacher head's keys lie, and its queries."""
    head = tl.load(head_ptr)
    q_t = load_queries(teacher, b, head, i, S)
    return keys_of(teacher, b, head), q_t


@triton.jit
def teacher_part(lp_t, KIND: tl.constexpr):
    """What one teacher head adds to the sum over pairs: P_t (forward) or log2 P_t (reverse)."""
    if KIND == REVERSE:
        return lp_t
    return tl.exp2(lp_t)


@triton.jit
def dscores(x_s, lse_s, total, rows_kl, student, to_log2, G: tl.constexpr, KIND: tl.constexpr):
    """Gradient by the student's scaled scores, summed over the G pairs, up to constant factors (fp32).

    total = Σ_g teacher_part; rows_kl = Σ_g RKL in log2 units (reverse only).
    """
    lp_s = x_s - lse_s
    p_s = tl.exp2(lp_s)
    ds = G * p_s - total
    if KIND == REVERSE:
        ds = p_s * (G * lp_s - total - rows_kl)
    if student.cap is not None:
        ratio = x_s / (to_log2 * student.cap)
        ds *= 1.0 - ratio * ratio
    return ds


@triton.jit
def attention_dq_kernel(
    student,  # Model
    teacher,  # Model
    mask,  # Mask
    head_map_ptr,  # [Hs, G] int32
    kl_ptr,  # [B, Hs, S] fp32, mean over pairs: read by reverse KL, written without upstream
    lse_s_ptr,  # [B, Hs, S] fp32, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32, log2
    upstream_ptr,  # [] fp32; None: the log-sum-exps came from the caller and no forward ran, so write the rows' KL too
    dq_ptr,  # [B, Hs, S, DS] out, contiguous
    to_log2,  # log2(e) / T
    unit,  # factor on the scores' gradient before it is rounded to the inputs' dtype
    factor,  # factor on dq
    G: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    EMIT: tl.constexpr = upstream_ptr is None
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    S = mask.S
    i = first + tl.arange(0, BLOCK_M)
    row_at = (b * heads + h) * S + i
    cols = tl.arange(0, student.BLOCK_D)
    dq_ptrs = dq_ptr + (row_at * student.D)[:, None] + cols[None, :]
    stored = (i < S)[:, None] & (cols < student.D)[None, :]
    if mask.rows is not None:
        kept = tl.load(mask.rows + b * S + i, mask=i < S, other=0)
        if tl.max(kept.to(tl.int32), 0) == 0:
            tl.store(dq_ptrs, tl.zeros([BLOCK_M, student.BLOCK_D], dq_ptr.dtype.element_ty), mask=stored)
            if EMIT:
                tl.store(kl_ptr + row_at, tl.zeros([BLOCK_M], tl.float32), mask=i < S)
            return
    starts, ends = load_segments(mask, b, i)
    ks_ptr = keys_of(student, b, h)
    q_s = load_queries(student, b, h, i, S)
    lse_s, rows_kl = load_statistics(kl_ptr, lse_s_ptr, row_at, i < S, G, KIND)
    lo, full, hi = key_range(mask, first, i, starts, ends, BLOCK_N)
    head_map_ptr += h * G
    lse_t_ptr += (b * heads + h) * G * S
    if G == 1:  # the teacher's queries stay on chip; with several heads they are read again per block of keys
        kt_ptr, q_t = load_teacher(teacher, b, head_map_ptr, i, S)
        lse_t = tl.load(lse_t_ptr + i, mask=i < S, other=EMPTY)

    dq = tl.zeros([BLOCK_M, student.BLOCK_D], tl.float32)
    kl = tl.zeros([BLOCK_M], tl.float32)
    for MASKED in tl.static_range(2):
        for n in range(full if MASKED else lo, hi if MASKED else full, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            k_s = load_keys(student, ks_ptr, j, S, MASKED)
            x_s = scores(q_s, k_s, student, to_log2)
            if MASKED:
                seen = visible(mask, i, j, starts, ends, load_key_mask(mask, b, j), 0)
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for g in range(0, G):
                if G > 1:
                    kt_ptr, q_t = load_teacher(teacher, b, head_map_ptr + g, i, S)
                k_t = load_keys(teacher, kt_ptr, j, S, MASKED)
                if G > 1:
                    lse_t = tl.load(lse_t_ptr + g * S + i, mask=i < S, other=EMPTY)
                lp_t = scores(q_t, k_t, teacher, to_log2) - lse_t[:, None]
                part = teacher_part(lp_t, KIND)
                total = part if G == 1 else total + part
                if EMIT:
                    term = part * (lp_t - x_s + lse_s[:, None])
                    if MASKED:
                        term = tl.where(seen, term, 0.0)
                    kl += tl.sum(term, 1)
            ds = dscores(x_s, lse_s[:, None], total, rows_kl[:, None], student, to_log2, G, KIND)
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
            dq = dot((ds * unit).to(k_s.dtype), k_s, dq, "ieee")

    upstream = 1.0
    if EMIT:
        tl.store(kl_ptr + row_at, kl * (LN2 / G), mask=i < S)
    else:
        upstream = tl.load(upstream_ptr).to(tl.float32)
    tl.store(dq_ptrs, (dq * (factor * upstream)).to(dq_ptr.dtype.element_ty), mask=stored)


@triton.jit
def query_range(mask, b, first, j, blocks_ptr, ranks_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, hi): query blocks that can see the keys j from `first` on; with a list of blocks, places in it."""
    S = mask.S
    lo = 0
    hi = S
    if mask.CAUSAL:
        lo = first
    if mask.window is not None:
        hi = tl.minimum(hi, first + BLOCK_N - 1 + mask.window)
    if mask.starts is not None:  # a query sees a key only inside the key's own segment
        lo = tl.maximum(lo, tl.min(tl.load(mask.starts + b * S + j, mask=j < S, other=S), 0))
        hi = tl.minimum(hi, tl.max(tl.load(mask.ends + b * S + j, mask=j < S, other=0), 0))
    lo = lo // BLOCK_M
    hi = tl.maximum(lo, tl.cdiv(hi, BLOCK_M))
    if blocks_ptr is not None:
        width = tl.cdiv(S, BLOCK_M)
        lo = tl.load(ranks_ptr + b * (width + 1) + lo)
        hi = tl.load(ranks_ptr + b * (width + 1) + hi)
    return lo, hi


@triton.jit
def dscores_of_keys(
    student,
    teacher,
    mask,
    head_map_ptr,
    kl_ptr,
    lse_s_ptr,
    lse_t_ptr,
    b,
    h,
    heads,
    i,
    j,
    keys,
    k_s,
    k_t,  # read where FIXED and G == 1
    first,  # key
    first_query,
    to_log2,
    G: tl.constexpr,
    KIND: tl.constexpr,
    FIXED: tl.constexpr,
    EVERY_KEY: tl.constexpr,  # also keys beyond S get 0
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head's queries i, and `dscores` of keys by queries [BLOCK_N, BLOCK_M].

    Queries beyond S need no mask: their log-sum-exps are EMPTY.
    """
    S = mask.S
    q_s = load_queries(student, b, h, i, S)
    lse_s, rows_kl = load_statistics(kl_ptr, lse_s_ptr, (b * heads + h) * S + i, i < S, G, KIND)
    starts, ends = load_segments(mask, b, i)
    x_s = scores(k_s, q_s, student, to_log2)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for g in range(0, G):
        kt_ptr, q_t = load_teacher(teacher, b, head_map_ptr + h * G + g, i, S)
        lse_t_at = ((b * heads + h) * G + g) * S + i
        lse_t = tl.load(lse_t_ptr + lse_t_at, mask=i < S, other=EMPTY)
        head_keys = k_t if FIXED and G == 1 else load_keys(teacher, kt_ptr, j, S, True)
        part = teacher_part(scores(head_keys, q_t, teacher, to_log2) - lse_t[None, :], KIND)
        total = part if G == 1 else total + part
    ds = dscores(x_s, lse_s[None, :], total, rows_kl[None, :], student, to_log2, G, KIND)
    RAGGED: tl.constexpr = mask.window is not None or mask.starts is not None or mask.keys is not None
    if RAGGED or (EVERY_KEY and not mask.CAUSAL):
        ds = tl.where(visible(mask, i, j, starts, ends, keys, 1), ds, 0.0)
    elif mask.CAUSAL:  # noqa: SIM102, the compiler decides this one and the loop the next
        if first_query < first + BLOCK_N - 1:  # on the diagonal, where all keys beyond S are
            ds = tl.where(visible(mask, i, j, starts, ends, keys, 1), ds, 0.0)
    return q_s, ds


@triton.jit
def attention_dk_kernel(
    student,  # Model
    teacher,  # Model
    mask,  # Mask, of which `rows` is not read
    head_map_ptr,  # [Hs, G] int32
    blocks_ptr,  # [B, ceil(S / BLOCK_M)] int32, query blocks with a kept row first, in order; None: all are kept
    ranks_ptr,  # [B, ceil(S / BLOCK_M) + 1] int32, how many kept blocks lie before each block
    kl_ptr,  # [B, Hs, S] fp32, mean over pairs (reverse KL)
    lse_s_ptr,  # [B, Hs, S] fp32, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32, log2
    upstream_ptr,  # [] fp32
    dk_ptr,  # [B, Hs / GROUP, S, DS] out, contiguous
    to_log2,  # log2(e) / T
    unit,
    factor,
    G: tl.constexpr,
    KIND: tl.constexpr,
    FIXED: tl.constexpr,  # all query heads of this key head answer to one teacher key head: its keys are read once
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * student.GROUP
    S = mask.S
    j = first + tl.arange(0, BLOCK_N)
    keys = load_key_mask(mask, b, j)

    lo, hi = query_range(mask, b, first, j, blocks_ptr, ranks_ptr, BLOCK_M, BLOCK_N)
    if blocks_ptr is not None:
        blocks_ptr += b * tl.cdiv(S, BLOCK_M)
    count = hi - lo

    k_s = load_keys(student, keys_of(student, b, hk * student.GROUP), j, S, True)
    k_t = k_s
    if FIXED and G == 1:
        ht = tl.load(head_map_ptr + hk * student.GROUP)
        k_t = load_keys(teacher, keys_of(teacher, b, ht), j, S, True)

    # One loop over (query head, query block): two nested loops cost the registers that this kernel does not have.
    # Keys beyond S need no mask: their rows are not stored.
    h = hk * student.GROUP
    at = lo
    dk = tl.zeros([BLOCK_N, student.BLOCK_D], tl.float32)
    for _ in range(0, count * student.GROUP):
        block = at
        if blocks_ptr is not None:
            block = tl.load(blocks_ptr + block)
        i = block * BLOCK_M + tl.arange(0, BLOCK_M)
        q_s, ds = dscores_of_keys(
            student, teacher, mask, head_map_ptr, kl_ptr, lse_s_ptr, lse_t_ptr, b, h, heads, i, j, keys, k_s, k_t,
            first, block * BLOCK_M, to_log2, G, KIND, FIXED, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dk = dot((ds * unit).to(q_s.dtype), q_s, dk, "ieee")
        at += 1
        last = at == hi
        h = tl.where(last, h + 1, h)
        at = tl.where(last, lo, at)

    cols = tl.arange(0, student.BLOCK_D)
    at = ((b * tl.num_programs(1) + hk) * S + j) * student.D
    upstream = tl.load(upstream_ptr).to(tl.float32)
    tl.store(
        dk_ptr + at[:, None] + cols[None, :],
        (dk * (factor * upstream)).to(dk_ptr.dtype.element_ty),
        mask=(j < S)[:, None] & (cols < student.D)[None, :],
    )
