"""The sums of a divergence, block by block of columns: what the row kernel, the fused head and the maps have in common.

A block is [columns] of one row (AXIS 0) or [rows, columns] (AXIS 1). Probabilities are 2^((x - m) · to_log2 - log),
with the row's maximum m and the log2 `log` of its sum. The order counts: x - m is nearly exact where a probability is
large, while x · to_log2, or m and log in one number, are rounded at the size of the largest logit. What -inf means is
in `losses/divergence.py`; the maths is in README.md.
"""

import triton
import triton.language as tl

from .launch import FORWARD, LOG2E, NONE, REVERSE, TINY


@triton.jit
def per_row(value, AXIS: tl.constexpr):
    """One value per row, shaped so that it meets a block."""
    return value[:, None] if AXIS == 1 else value


@triton.jit
def rescaled(e, INFINITE: tl.constexpr):
    """A factor e = 2^x; where it meets INFINITE numbers it may not round to 0, as 0 · inf is nan."""
    if INFINITE:
        return tl.maximum(e, TINY)
    return e


@triton.jit
def weighted(e, u, difference, INFINITE: tl.constexpr):
    """e · difference with e = 2^u. Where they may be INFINITE, a token that is not there (u = -inf) adds nothing, but
    one that the other model lacks adds inf, also where its e rounds to 0."""
    if INFINITE:  # of the ways to say it, the one that spills in no kernel
        return rescaled(e, True) * tl.where(u > float("-inf"), difference, 0.0)
    return e * difference


@triton.jit
def log_probabilities(x, m, log, to_log2, AXIS: tl.constexpr):
    """log2 of a block's probabilities, from the maximum and the log2 of the sum of its row."""
    return (x - per_row(m, AXIS)) * to_log2 - per_row(log, AXIS)


@triton.jit
def online_update(
    x_s, x_t, m_s, l_s, m_t, l_t, a, to_log2, KIND: tl.constexpr, INFINITE: tl.constexpr, AXIS: tl.constexpr
):
    """One block added to the running maxima m, sums l and `a`, the shifted accumulator of Σ p · (log2 p/q).

    `to_log2` is None where x are in the log2 domain already, as attention scores are, which are rounded in any case.
    """
    new_s = tl.maximum(m_s, tl.max(x_s, AXIS))
    new_t = m_t
    if KIND != NONE:
        new_t = tl.maximum(m_t, tl.max(x_t, AXIS))
    d_s = new_s - m_s
    d_t = new_t - m_t
    u_s = x_s - per_row(new_s, AXIS)
    u_t = x_t - per_row(new_t, AXIS)
    if to_log2 is not None:
        d_s *= to_log2
        d_t *= to_log2
        u_s *= to_log2
        u_t *= to_log2
    e_s = tl.exp2(u_s)
    e_t = tl.exp2(u_t)
    if KIND == FORWARD:
        more = tl.sum(weighted(e_t, u_t, u_t - u_s, INFINITE), AXIS)
        a = rescaled(tl.exp2(-d_t), INFINITE) * (a - l_t * (d_t - d_s)) + more
    if KIND == REVERSE:
        more = tl.sum(weighted(e_s, u_s, u_s - u_t, INFINITE), AXIS)
        a = rescaled(tl.exp2(-d_s), INFINITE) * (a - l_s * (d_s - d_t)) + more
    l_s = tl.exp2(-d_s) * l_s + tl.sum(e_s, AXIS)
    if KIND != NONE:
        l_t = tl.exp2(-d_t) * l_t + tl.sum(e_t, AXIS)
    return new_s, l_s, new_t, l_t, a


@triton.jit
def sum_at_temperature_1(l_1, x, before, m, AXIS: tl.constexpr):
    """The sum for a cross-entropy of logits x, at temperature 1; `before` is the maximum before this block."""
    return tl.exp2((before - m) * LOG2E) * l_1 + tl.sum(tl.exp2((x - per_row(m, AXIS)) * LOG2E), AXIS)


@triton.jit
def divergence(a, l_s, l_t, KIND: tl.constexpr):
    """KL in bits from its sums (forward or reverse)."""
    if KIND == REVERSE:
        return a / l_s + tl.log2(l_t / l_s)
    return a / l_t + tl.log2(l_s / l_t)


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
