"""dq and dk of the attention-map loss in one kernel, which computes the scores once, and the sum of its parts of dq.

A split of the key blocks has an fp32 buffer for dq of its own: one program adds to it, block after block, so there are
no atomics and the order is fixed. Names are those of `attention_forward.py`.
"""

import triton
import triton.language as tl

from .attention_backward import dscores_of_keys, query_range
from .attention_forward import keys_of, load_key_mask, load_keys
from .launch import dot


@triton.jit
def attention_fused_kernel(
    student,  # Model
    teacher,  # Model
    mask,  # Mask, of which `rows` is not read
    head_map_ptr,  # [Hs, G] int32
    blocks_ptr,  # [B, ceil(S / BLOCK_M)] int32, as in `attention_dk_kernel`
    ranks_ptr,  # [B, ceil(S / BLOCK_M) + 1] int32
    kl_ptr,  # [B, Hs, S] fp32, mean over pairs (reverse KL)
    lse_s_ptr,  # [B, Hs, S] fp32, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32, log2
    upstream_ptr,  # [] fp32
    parts_ptr,  # [splits, B, Hs, S, DS] fp32, zeros at first; dq without its factor
    dk_ptr,  # [B, Hs / GROUP, S, DS] out, contiguous
    to_log2,  # log2(e) / T
    unit,
    factor,
    G: tl.constexpr,
    KIND: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    hk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * student.GROUP
    S = mask.S
    cols = tl.arange(0, student.BLOCK_D)
    upstream = tl.load(upstream_ptr).to(tl.float32)
    parts_ptr += (split * tl.num_programs(2) + b) * heads * S * student.D
    if blocks_ptr is not None:
        listed_ptr = blocks_ptr + b * tl.cdiv(S, BLOCK_M)
    for n in range(split, tl.cdiv(S, BLOCK_N), splits):
        first = n * BLOCK_N
        j = first + tl.arange(0, BLOCK_N)
        keys = load_key_mask(mask, b, j)
        lo, hi = query_range(mask, b, first, j, blocks_ptr, ranks_ptr, BLOCK_M, BLOCK_N)
        k_s = load_keys(student, keys_of(student, b, hk * student.GROUP), j, S, True)
        k_t = k_s
        if FIXED and G == 1:
            ht = tl.load(head_map_ptr + hk * student.GROUP)
            k_t = load_keys(teacher, keys_of(teacher, b, ht), j, S, True)
        h = hk * student.GROUP
        at = lo
        dk = tl.zeros([BLOCK_N, student.BLOCK_D], tl.float32)
        for _ in range(0, (hi - lo) * student.GROUP):
            block = at
            if blocks_ptr is not None:
                block = tl.load(listed_ptr + block)
            i = block * BLOCK_M + tl.arange(0, BLOCK_M)
            q_s, ds = dscores_of_keys(
                student, teacher, mask, head_map_ptr, kl_ptr, lse_s_ptr, lse_t_ptr, b, h, heads, i, j, keys, k_s, k_t,
                first, block * BLOCK_M, to_log2, G, KIND, FIXED, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = (ds * unit).to(q_s.dtype)
            dk = dot(ds, q_s, dk, "ieee")
            dq = dot(ds.T, k_s, tl.zeros([BLOCK_M, student.BLOCK_D], tl.float32), "ieee")
            dq_ptrs = parts_ptr + ((h * S + i) * student.D)[:, None] + cols[None, :]
            stored = (i < S)[:, None] & (cols < student.D)[None, :]
            tl.store(dq_ptrs, tl.load(dq_ptrs, mask=stored, other=0.0) + dq, mask=stored)
            at += 1
            last = at == hi
            h = tl.where(last, h + 1, h)
            at = tl.where(last, lo, at)

        at = ((b * tl.num_programs(1) + hk) * S + j) * student.D
        tl.store(
            dk_ptr + at[:, None] + cols[None, :],
            (dk * (factor * upstream)).to(dk_ptr.dtype.element_ty),
            mask=(j < S)[:, None] & (cols < student.D)[None, :],
        )
        tl.debug_barrier()  # the next block of keys loads what other threads may have stored


@triton.jit
def sum_parts_kernel(parts_ptr, upstream_ptr, dq_ptr, factor, splits, size, BLOCK: tl.constexpr):
    """dq [size] = factor · upstream · Σ parts [splits, size], in their order and rounded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dq = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        dq += tl.load(parts_ptr + at, mask=inside, other=0.0)
        parts_ptr += size
    upstream = tl.load(upstream_ptr).to(tl.float32)
    tl.store(dq_ptr + at, (dq * (factor * upstream)).to(dq_ptr.dtype.element_ty), mask=inside)
