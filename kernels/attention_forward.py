"""The forward kernel of the attention-map loss, and what it shares with the backward kernels. Maths in README.md.

Scores live in registers only.

Names: i indexes queries and j keys of one sequence; x are scores in the log2 domain, x = score · log2(e) / T, so that
probabilities are 2^(x - lse). A *pair* is one student head with one of the G teacher heads that it answers to.
A row that is masked out, or sees no key, has lse = EMPTY: then every probability is 0 and the row drops out.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .divergence import divergence, online_update
from .launch import LN2, LOWEST, dot, soft_cap

EMPTY = tl.constexpr(1.0e30)
HIDDEN = tl.constexpr(-2.0e30)  # below LOWEST: 2^(HIDDEN - m) is 0 even before any key was seen


class Model(NamedTuple):
    """Queries and keys of one model, as a kernel takes them. Strides are those of batch, head and token."""

    q: Any  # [B, H, S, D]
    k: Any  # [B, H / GROUP, S, D]
    q_strides: tuple[Any, ...]
    k_strides: tuple[Any, ...]
    scale: Any
    cap: Any
    GROUP: Any  # query heads per key head
    D: Any
    BLOCK_D: Any


class Mask(NamedTuple):
    """Which keys a query sees and which queries count, as a kernel takes it: what is None takes no part."""

    starts: Any  # [B, S] int32, first key of each token's segment
    ends: Any  # [B, S] int32
    keys: Any  # [B, S] uint8
    rows: Any  # [B, S] uint8
    S: Any
    window: Any
    CAUSAL: Any


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
def load_queries(model, b, head, i, S):
    ptr = model.q + b * model.q_strides[0] + head.to(tl.int64) * model.q_strides[1]
    return load_tile(ptr, i, model.q_strides[2], S, model.D, model.BLOCK_D, True)


@triton.jit
def keys_of(model, b, head):
    """Where a query head's keys lie: apart from `load_keys`, as the compiler does not move it out of a loop."""
    return model.k + b * model.k_strides[0] + (head // model.GROUP).to(tl.int64) * model.k_strides[1]


@triton.jit
def load_keys(model, ptr, j, S, BOUNDED: tl.constexpr):
    return load_tile(ptr, j, model.k_strides[2], S, model.D, model.BLOCK_D, BOUNDED)


@triton.jit
def quarters(x):
    """Every fourth column, from the first, second, third and fourth on."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    a, c = tl.split(tl.reshape(even, [x.shape[0], x.shape[1] // 4, 2]))
    b, d = tl.split(tl.reshape(odd, [x.shape[0], x.shape[1] // 4, 2]))
    return a, b, c, d


@triton.jit
def product(a, b):
    """a @ b.T. A thread of plain fp32 arithmetic holds whole rows of both operands, so wide ones go in quarters."""
    acc = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    if a.dtype == tl.float32 and a.shape[1] > 64:
        a0, a1, a2, a3 = quarters(a)
        b0, b1, b2, b3 = quarters(b)
        acc = dot(a0, b0.T, acc, "ieee")
        acc = dot(a1, b1.T, acc, "ieee")
        acc = dot(a2, b2.T, acc, "ieee")
        return dot(a3, b3.T, acc, "ieee")
    return dot(a, b.T, acc, "ieee")


@triton.jit
def scores(a, b, model, to_log2):
    """softcap(scale · a @ b.T) · to_log2 as fp32 [len(a), len(b)]."""
    x = product(a, b)
    if model.cap is not None:
        return soft_cap(x * model.scale, model.cap) * to_log2
    return x * (model.scale * to_log2)


@triton.jit
def load_segments(mask, b, i):
    """First key and end of each query's segment; not read where there are none."""
    starts = i
    ends = i
    if mask.starts is not None:
        starts = tl.load(mask.starts + b * mask.S + i, mask=i < mask.S, other=0)
        ends = tl.load(mask.ends + b * mask.S + i, mask=i < mask.S, other=0)
    return starts, ends


@triton.jit
def load_key_mask(mask, b, j):
    """Nonzero where a key may be seen; not read where there is no mask."""
    keys = j
    if mask.keys is not None:
        keys = tl.load(mask.keys + b * mask.S + j, mask=j < mask.S, other=0)
    return keys


@triton.jit
def visible(mask, i, j, starts, ends, keys, QUERIES: tl.constexpr):
    """Whether query i sees key j: queries along the axis QUERIES, keys along the other."""
    KEYS: tl.constexpr = 1 - QUERIES
    i = tl.expand_dims(i, KEYS)
    j = tl.expand_dims(j, QUERIES)
    starts = tl.expand_dims(starts, KEYS)
    ends = tl.expand_dims(ends, KEYS)
    keys = tl.expand_dims(keys, QUERIES)
    seen = (j < mask.S) & (i < mask.S)
    if mask.CAUSAL:
        seen = seen & (j <= i)
    if mask.window is not None:
        seen = seen & (j > i - mask.window)
    if mask.starts is not None:
        seen = seen & (j >= starts) & (j < ends)
    if mask.keys is not None:
        seen = seen & (keys != 0)
    return seen


@triton.jit
def key_range(mask, first, i, starts, ends, BLOCK_N: tl.constexpr):
    """(lo, full, hi): keys [lo, hi) can be seen by the queries i from `first` on, blocks before `full` need no mask."""
    lo = 0
    hi = mask.S
    if mask.CAUSAL:
        hi = tl.minimum(mask.S, tl.max(i, 0) + 1)
    if mask.window is not None:
        lo = tl.maximum(lo, first - mask.window + 1)
    if mask.starts is not None:
        lo = tl.maximum(lo, tl.min(tl.where(i < mask.S, starts, mask.S), 0))
        hi = tl.minimum(hi, tl.max(tl.where(i < mask.S, ends, 0), 0))
    lo = (lo // BLOCK_N) * BLOCK_N
    full = (mask.S // BLOCK_N) * BLOCK_N
    if mask.CAUSAL:
        full = ((first + 1) // BLOCK_N) * BLOCK_N
    if mask.window is not None or mask.starts is not None or mask.keys is not None:
        full = lo
    return lo, full, hi


@triton.jit
def attention_forward_kernel(
    student,  # Model
    teacher,  # Model
    mask,  # Mask
    head_map_ptr,  # [Hs, G] int32, teacher heads of each student head
    kl_ptr,  # [B, Hs, G, S] fp32 out
    lse_s_ptr,  # [B, Hs, S] fp32 out, log2
    lse_t_ptr,  # [B, Hs, G, S] fp32 out, log2
    to_log2,  # log2(e) / T
    G: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest causal rows start first
    pair = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    h = pair // G
    S = mask.S
    i = first + tl.arange(0, BLOCK_M)
    row_at = (b * tl.num_programs(1) + pair) * S + i
    lse_s_at = (b * (tl.num_programs(1) // G) + h) * S + i
    kept = i < S
    if mask.rows is not None:
        kept = tl.load(mask.rows + b * S + i, mask=i < S, other=0) != 0
        if tl.max(kept.to(tl.int32), 0) == 0:
            tl.store(kl_ptr + row_at, tl.zeros([BLOCK_M], tl.float32), mask=i < S)
            tl.store(lse_t_ptr + row_at, tl.full([BLOCK_M], EMPTY, tl.float32), mask=i < S)
            tl.store(lse_s_ptr + lse_s_at, tl.full([BLOCK_M], EMPTY, tl.float32), mask=(i < S) & (pair % G == 0))
            return
    starts, ends = load_segments(mask, b, i)
    ht = tl.load(head_map_ptr + pair)
    ks_ptr = keys_of(student, b, h)
    kt_ptr = keys_of(teacher, b, ht)
    q_s = load_queries(student, b, h, i, S)
    q_t = load_queries(teacher, b, ht, i, S)
    lo, full, hi = key_range(mask, first, i, starts, ends, BLOCK_N)

    m_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_t = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    l_t = tl.zeros([BLOCK_M], tl.float32)
    a = tl.zeros([BLOCK_M], tl.float32)
    for MASKED in tl.static_range(2):
        for n in range(full if MASKED else lo, hi if MASKED else full, BLOCK_N):
            j = n + tl.arange(0, BLOCK_N)
            if MASKED:
                seen = visible(mask, i, j, starts, ends, load_key_mask(mask, b, j), 0)
            x_s = scores(q_s, load_keys(student, ks_ptr, j, S, MASKED), student, to_log2)
            x_t = scores(q_t, load_keys(teacher, kt_ptr, j, S, MASKED), teacher, to_log2)
            if MASKED:
                x_s = tl.where(seen, x_s, HIDDEN)
                x_t = tl.where(seen, x_t, HIDDEN)
            m_s, l_s, m_t, l_t, a = online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, None, KIND, False, 1)

    kept = kept & (l_t > 0) & (l_s > 0)
    l_s = tl.where(kept, l_s, 1.0)
    l_t = tl.where(kept, l_t, 1.0)
    log_s = tl.log2(l_s)
    log_t = tl.log2(l_t)
    kl = divergence(a, l_s, l_t, KIND)
    tl.store(kl_ptr + row_at, tl.where(kept, kl * LN2, 0.0), mask=i < S)
    tl.store(lse_t_ptr + row_at, tl.where(kept, m_t + log_t, EMPTY), mask=i < S)
    tl.store(lse_s_ptr + lse_s_at, tl.where(kept, m_s + log_s, EMPTY), mask=(i < S) & (pair % G == 0))
