"""The attention loss in plain torch, in tiles: a few query rows against the keys they see.

No map of S x S scores is ever held: a tile is scored, compared and differentiated while it is at hand. This is the CPU
path, the oracle of the Triton kernel and the baseline of its benchmark. Shapes as in `attention.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_SCORES = 1 << 22
"""Scores of one model that a tile holds at most (16 MiB in fp32), unless 8 query rows alone need more."""


@dataclass(frozen=True)
class _Scores:
    """How one model makes attention scores of its queries and keys."""

    scale: float
    softcap: float | None
    temperature: float

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [B, H, rows, keys] and, under a soft-cap, their derivative by the raw score (without the scale)."""
        b, heads, rows, dim = q.shape
        # Heads that share a key head become rows of one product, so keys are never repeated.
        grouped = q.reshape(b, k.shape[1], -1, dim)
        scores = torch.matmul(grouped * self.scale, k.transpose(-1, -2)).view(b, heads, rows, k.shape[2])
        slope = None
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_()
            slope = 1 - scores * scores
            scores = scores.mul_(self.softcap)
        return scores.div_(self.temperature) if self.temperature != 1 else scores, slope


@dataclass(frozen=True)
class _Rows:
    """What every query row sees: the keys first..last of its own row that the key mask keeps. All on the CPU."""

    first: Int[Tensor, "B S"]
    last: Int[Tensor, "B S"]
    keep: Bool[Tensor, "B S"]  # rows that count and see a key
    key_mask: Bool[Tensor, "B S"] | None

    @classmethod
    def of(
        cls,
        b: int,
        s: int,
        causal: bool,
        window: int | None,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
        row_mask: Tensor | None,
    ) -> "_Rows":
        position = torch.arange(s).expand(b, s)
        first, end = torch.zeros(b, s, dtype=torch.long), torch.full((b, s), s)
        if cu_seqlens is not None:
            bounds = cu_seqlens.long().cpu()
            if bounds.numel() < 2 or bounds[0] != 0 or bounds[-1] != b * s or bool((bounds.diff() < 0).any()):
                raise ValueError(f"attention_kl: cu_seqlens must rise from 0 to {b * s}, found {bounds.tolist()[:8]}…")
            token = torch.arange(b * s).view(b, s)
            segment = torch.searchsorted(bounds, token, right=True)
            row_start = token[:, :1]
            first = (bounds[segment - 1] - row_start).clamp_min(0)
            end = (bounds[segment] - row_start).clamp_max(s)
        if causal:
            end = position + 1
        if window is not None:
            first = torch.maximum(first, position - window + 1)
        keep = torch.ones(b, s, dtype=torch.bool) if row_mask is None else row_mask.cpu()
        if key_mask is not None:
            key_mask = key_mask.cpu()
            seen = torch.nn.functional.pad(key_mask.long().cumsum(1), (1, 0))
            keep = keep & (seen.gather(1, end) > seen.gather(1, first))
        return cls(first, end - 1, keep, key_mask)

    def tiles(self, heads: int) -> Iterator[tuple[slice, list[tuple[Tensor, slice]]]]:
        """Batch rows that go together, and for each their tiles: query positions [rows] and a range of keys."""
        b, s = self.keep.shape
        together = max(1, TILE_SCORES // max(1, heads * s * s))
        for start in range(0, b, together):
            rows = slice(start, min(start + together, b))
            positions = self.keep[rows].any(0).nonzero().flatten()
            tiles: list[tuple[Tensor, slice]] = []
            while positions.numel():
                count = max(8, TILE_SCORES // (heads * (rows.stop - rows.start) * s))
                tile, positions = positions[:count], positions[count:]
                lo, hi = self.first[rows][:, tile].min(), self.last[rows][:, tile].max()
                tiles.append((tile, slice(int(lo), int(hi) + 1)))
            if tiles:
                yield rows, tiles

    def visible(self, rows: slice, tile: Tensor, keys: slice, device: torch.device) -> Bool[Tensor, "b 1 rows keys"]:
        key = torch.arange(keys.start, keys.stop, device=device)
        first = self.first[rows][:, tile].to(device)[:, None, :, None]
        last = self.last[rows][:, tile].to(device)[:, None, :, None]
        visible = (key >= first) & (key <= last)
        if self.key_mask is not None:
            visible &= self.key_mask[rows, keys].to(device)[:, None, None, :]
        return visible


def _log_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    # A finite fill keeps the log-probability of a hidden key finite: 0 * inf would be nan.
    return torch.log_softmax(scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 4), dim=-1)


def _tile_divergence(log_s: Tensor, log_t: Tensor, head_map: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Divergence of every row [B, Hs, rows] and its gradient by the student's scores [B, Hs, rows, keys].

    forward: sum_k p_t (log p_t - log p_s), gradient p_s - p_t;
    reverse: KL = sum_k p_s (log p_s - log p_t), gradient p_s (log p_s - log p_t - KL).
    A group of teacher heads: the mean of both over the group.
    """
    p_s = log_s.exp()
    group = head_map.shape[1]
    identity = group == 1 and torch.equal(head_map[:, 0], torch.arange(log_t.shape[1]))
    divergence = torch.zeros(log_s.shape[:-1], dtype=log_s.dtype, device=log_s.device)
    gradient = p_s.clone() if kind == "forward" else torch.zeros_like(p_s)
    for g in range(group):
        log_p = log_t if identity else log_t.index_select(1, head_map[:, g].to(log_t.device))
        if kind == "forward":
            p_t = log_p.exp()
            divergence += (p_t * (log_p - log_s)).sum(-1) / group
            gradient.sub_(p_t, alpha=1 / group)
        else:
            difference = log_s - log_p
            row = (p_s * difference).sum(-1)
            divergence += row / group
            gradient.add_(p_s * (difference - row[..., None]), alpha=1 / group)
    return divergence, gradient


class _AttentionKL(torch.autograd.Function):
    """Takes the gradient in the forward pass, while a tile is at hand: four products instead of six, and backward
    needs neither the teacher's tensors nor the student's, only what it returns."""

    @staticmethod
    def forward(
        ctx: Any,
        q_s: Tensor,
        k_s: Tensor,
        q_t: Tensor,
        k_t: Tensor,
        student: _Scores,
        teacher: _Scores,
        rows: _Rows,
        head_map: Tensor,
        kind: str,
        with_gradient: bool,
    ) -> Tensor:
        dtype = torch.float64 if q_s.dtype == torch.float64 else torch.float32
        # fp16 would lose small gradients before the loss scale of backward reaches them.
        stored = torch.float32 if q_s.dtype == torch.float16 else q_s.dtype
        heads = q_s.shape[1]
        total = torch.zeros((), dtype=dtype, device=q_s.device)
        dq = torch.zeros_like(q_s, dtype=stored) if with_gradient else None
        dk = torch.zeros_like(k_s, dtype=stored) if with_gradient else None
        with torch.autocast(q_s.device.type, enabled=False):
            for batch, tiles in rows.tiles(max(heads, q_t.shape[1])):
                k_student, k_teacher = k_s[batch].to(dtype), k_t[batch].to(dtype)
                dk_batch = torch.zeros_like(k_student)
                for tile, keys in tiles:
                    index = tile.to(q_s.device)
                    hidden = ~rows.visible(batch, tile, keys, q_s.device)
                    weight = rows.keep[batch][:, tile].to(q_s.device, dtype)[:, None, :] / heads
                    q_rows = q_s[batch].index_select(2, index).to(dtype)
                    q_teacher = q_t[batch].index_select(2, index).to(dtype)
                    log_t = _log_softmax(teacher(q_teacher, k_teacher[:, :, keys])[0], hidden)
                    scores, slope = student(q_rows, k_student[:, :, keys])
                    divergence, gradient = _tile_divergence(_log_softmax(scores, hidden), log_t, head_map, kind)
                    total += (divergence * weight).sum()
                    if dq is None:
                        continue
                    gradient *= weight[..., None] * (student.scale / student.temperature)
                    if slope is not None:
                        gradient *= slope
                    gradient = gradient.view(*k_student.shape[:2], -1, keys.stop - keys.start)
                    dq_rows = torch.matmul(gradient, k_student[:, :, keys]).view_as(q_rows)
                    dq[batch].index_copy_(2, index, dq_rows.to(stored))
                    q_grouped = q_rows.reshape(*k_student.shape[:2], -1, q_rows.shape[-1])
                    dk_batch[:, :, keys] += torch.matmul(gradient.transpose(-1, -2), q_grouped)
                if dk is not None:
                    dk[batch] = dk_batch.to(stored)
        if dq is not None and dk is not None:
            ctx.save_for_backward(dq, dk)
        ctx.dtype = q_s.dtype, k_s.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = ctx.saved_tensors
        return (dq * upstream).to(ctx.dtype[0]), (dk * upstream).to(ctx.dtype[1]), *([None] * 8)


def tiled_attention_kl(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    scale_student: float,
    scale_teacher: float,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    row_mask: Tensor | None,
    kind: str,
    temperature: float,
    head_map: Tensor,
    softcap_student: float | None,
    softcap_teacher: float | None,
) -> Tensor:
    """`attention.attention_kl` in plain torch; its arguments, every one resolved and checked."""
    rows = _Rows.of(q_s.shape[0], q_s.shape[2], causal, window, cu_seqlens, key_mask, row_mask)
    student = _Scores(scale_student, softcap_student, temperature)
    teacher = _Scores(scale_teacher, softcap_teacher, temperature)
    with_gradient = torch.is_grad_enabled() and (q_s.requires_grad or k_s.requires_grad)
    return _AttentionKL.apply(q_s, k_s, q_t, k_t, student, teacher, rows, head_map, kind, with_gradient)
