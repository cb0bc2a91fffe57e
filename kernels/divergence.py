"""The sums of a divergence, block by block of columns: what the row kernel, the fused head and the maps have in common.

x are values in the log2 domain, so that probabilities are 2^(x - lse). A block is [columns] of one row (AXIS 0) or
[rows, columns] (AXIS 1). The maths is in README.md.
"""

import triton
import triton.language as tl

from .launch import FORWARD, NONE, REVERSE


@triton.jit
def per_row(value, AXIS: tl.constexpr):
    """One value per row, shaped so that it meets a block."""
    return value[:, None] if AXIS == 1 else value


@triton.jit
def weighted(e, u, INFINITE: tl.constexpr):
    """e · u; where u may be INFINITE, a probability of 0 still makes it 0."""
    if INFINITE:
        return tl.where(e > 0, e * u, 0.0)
    return e * u


@triton.jit
def online_update(x_s, x_t, m_s, l_s, m_t, l_t, a, KIND: tl.constexpr, INFINITE: tl.constexpr, AXIS: tl.constexpr):
    """One block added to the running maxima m, sums l and `a`, the shifted accumulator of Σ p · (log2 p/q)."""
    new_s = tl.maximum(m_s, tl.max(x_s, AXIS))
    new_t = m_t
    if KIND != NONE:
        new_t = tl.maximum(m_t, tl.max(x_t, AXIS))
    d_s = new_s - m_s
    d_t = new_t - m_t
    u_s = x_s - per_row(new_s, AXIS)
    u_t = x_t - per_row(new_t, AXIS)
    e_s = tl.exp2(u_s)
    e_t = tl.exp2(u_t)
    if KIND == FORWARD:
        a = tl.exp2(-d_t) * (a - l_t * (d_t - d_s)) + tl.sum(weighted(e_t, u_t - u_s, INFINITE), AXIS)
    if KIND == REVERSE:
        a = tl.exp2(-d_s) * (a - l_s * (d_s - d_t)) + tl.sum(weighted(e_s, u_s - u_t, INFINITE), AXIS)
    l_s = tl.exp2(-d_s) * l_s + tl.sum(e_s, AXIS)
    if KIND != NONE:
        l_t = tl.exp2(-d_t) * l_t + tl.sum(e_t, AXIS)
    return new_s, l_s, new_t, l_t, a


@triton.jit
def sum_at_temperature_1(l_1, x, before, m, temperature, AXIS: tl.constexpr):
    """The sum for a cross-entropy, whose maximum is T · m; `before` is the maximum before this block."""
    return tl.exp2(-(m - before) * temperature) * l_1 + tl.sum(tl.exp2((x - per_row(m, AXIS)) * temperature), AXIS)


@triton.jit
def divergence(a, l_s, l_t, KIND: tl.constexpr):
    """KL in bits from its sums (forward or reverse)."""
    if KIND == REVERSE:
        return a / l_s - tl.log2(l_s) + tl.log2(l_t)
    return a / l_t - tl.log2(l_t) + tl.log2(l_s)


@triton.jit
def log_ratio(lp, lq):
    """log2 p - log2 q, finite: 0 where both are -inf, and clamped where the smaller one is below fp32 anyway."""
    return tl.where(lp == lq, 0.0, tl.minimum(tl.maximum(lp - lq, -126.0), 126.0))


@triton.jit
def mixture_sums(lp, lq, beta, AXIS: tl.constexpr):
    """One block's part of -KL(p || m) and -KL(q || m) in bits: both log-sum-exps are known before the mixture m is."""
    d = log_ratio(lp, lq)
    to_teacher = tl.sum(tl.exp2(lp) * tl.log2(beta + (1 - beta) * tl.exp2(-d)), AXIS)
    to_student = tl.sum(tl.exp2(lq) * tl.log2((1 - beta) + beta * tl.exp2(d)), AXIS)
    return to_teacher, to_student
