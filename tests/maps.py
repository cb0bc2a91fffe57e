"""Attention maps for the kernels' tests: problems, masks, the loss in fp64 on whole maps, and the comparison."""

import torch
from torch import Tensor


def visibility(batch, length, causal=True, window=None, cu_seqlens=None, key_mask=None) -> Tensor:  # type: ignore[no-untyped-def]
    """bool [B, S, S]."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.ones(batch, length, length, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= j > i - window
    if key_mask is not None:
        seen &= key_mask[:, None]
    if cu_seqlens is not None:
        ids = torch.bucketize(torch.arange(batch * length), cu_seqlens, right=True).view(batch, length)
        seen &= ids[:, :, None] == ids[:, None]
    return seen


def log_map(q, k, seen, scale, cap, temperature) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """Log-probabilities [B, H, S, S] and log-sum-exps [B, H, S]; finite nonsense where nothing is seen."""
    x = scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2))
    x = x if cap is None else cap * torch.tanh(x / cap)
    x = (x / temperature).masked_fill(~seen[:, None], -1e9)
    return x.log_softmax(-1), x.logsumexp(-1)


def reference(  # type: ignore[no-untyped-def]
    q_s, k_s, q_t, k_t, *, scale_student, scale_teacher, row_mask=None, kind="forward", temperature=1.0, head_map=None,
    softcap_student=None, softcap_teacher=None, **mask,
) -> Tensor:  # fmt: skip
    batch, heads, length, _ = q_s.shape
    seen = visibility(batch, length, **mask)
    lq, _ = log_map(q_s, k_s, seen, scale_student, softcap_student, temperature)
    lp, _ = log_map(q_t, k_t, seen, scale_teacher, softcap_teacher, temperature)
    if head_map is None:
        teachers = q_t.shape[1]
        head_map = (
            torch.arange(teachers).view(heads, -1)
            if teachers >= heads
            else torch.arange(heads)[:, None] * teachers // heads
        )
    kept = seen.any(-1) if row_mask is None else seen.any(-1) & row_mask
    total = q_s.new_zeros(())
    for g in range(head_map.shape[1]):
        lp_g = lp[:, head_map[:, g]]
        terms = lp_g.exp() * (lp_g - lq) if kind == "forward" else lq.exp() * (lq - lp_g)
        total = total + (terms.masked_fill(~seen[:, None], 0).sum(-1) * kept[:, None]).sum()
    return total / (head_map.shape[1] * heads)


def problem(batch=2, length=50, heads=(4, 2, 4, 2), dims=(16, 24), seed=0, std=1.5):  # type: ignore[no-untyped-def]
    """q and k of both models, two of them as transposed views, and scales that give scores the standard deviation."""
    torch.manual_seed(seed)
    hs, hs_kv, ht, ht_kv = heads
    q_s = torch.randn(batch, length, hs, dims[0]).transpose(1, 2)
    k_s = torch.randn(batch, hs_kv, length, dims[0])
    q_t = torch.randn(batch, ht, length, dims[1])
    k_t = torch.randn(batch, length, ht_kv, dims[1]).transpose(1, 2)
    return (q_s, k_s, q_t, k_t), {"scale_student": std * dims[0] ** -0.5, "scale_teacher": std * dims[1] ** -0.5}


def check(tensors, options, tolerance=1e-5, lse=None) -> Tensor:  # type: ignore[no-untyped-def]
    """Value and both gradients under an upstream gradient that is not 1; returns the value."""
    exact = [x.double() for x in tensors]
    exact[:2] = [x.detach().requires_grad_() for x in exact[:2]]
    expected = reference(*exact, **options)
    (expected * 1.7).backward()
    leaves = [x.detach().requires_grad_(n < 2) for n, x in enumerate(tensors)]
    from lightning_itk.kernels.attention import attention_kl  # Triton looks at its environment when imported

    found = attention_kl(*leaves, **options, **(lse or {}))
    (found * 1.7).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for name, a, b in zip("qk", leaves, exact, strict=False):
        assert a.grad is not None
        assert a.grad.shape == a.shape
        error = (a.grad.double() - b.grad).norm() / b.grad.norm().clamp_min(1e-12)
        assert error < tolerance, f"relative error {error:.1e} of d{name}"
    return found.detach()


def padding(length=50) -> Tensor:
    """Left padding in the first row, right padding in the second."""
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :9], mask[1, 40:] = False, False
    return mask


def answers(length=50) -> Tensor:
    rows = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) > 0.5
    rows[1, :34] = False
    return rows


PACKED = torch.tensor([0, 13, 45, 50, 77, 93], dtype=torch.int32)
