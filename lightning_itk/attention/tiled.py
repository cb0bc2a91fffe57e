"""The attention loss in plain torch, in tiles: a few query rows against the keys they see.

No map of S x S scores is ever held: a tile is scored, compared and differentiated while it is at hand. This is the CPU
path, the oracle of the Triton kernel and the baseline of its benchmark. Shapes as in `kl.py`.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lightning_itk.attention.layer import Masks
from lightning_itk.losses.divergence import Kind, divergence_and_gradient

TILE_SCORES = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Scores of one model that a tile holds at most, unless 8 query rows alone need more: 1 MiB in fp32, which stays in a
core's cache, and 128 MiB on a GPU, where small tiles would only be launches."""
_UNSEEN = -80.0  # exp() of less takes a CPU six times as long, and e^-80 is no probability that counts
_DOCUMENT_ROWS = 32
"""A tile of packed rows ends with a document once it has this many, so that it computes little that nobody sees."""


def group_heads(student_heads: int, teacher_heads: int) -> Int[Tensor, "Hs G"]:
    """The teacher heads that each student head answers to: consecutive groups.

    Fewer student heads: student head h answers to the h-th group of teacher heads. More student heads: consecutive
    student heads share a teacher head.

    Raises:
        ValueError: neither count divides the other.
    """
    if teacher_heads % student_heads == 0:
        return torch.arange(teacher_heads).view(student_heads, -1)
    if student_heads % teacher_heads == 0:
        return torch.arange(teacher_heads).repeat_interleave(student_heads // teacher_heads)[:, None]
    raise ValueError(
        f"the student has {student_heads} attention heads and the teacher {teacher_heads}: "
        "neither divides the other, give a head_map"
    )


@dataclass(frozen=True)
class Scores:
    """How one model makes attention scores of its queries and keys."""

    scale: float
    softcap: float | None
    temperature: float

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores [B, H, rows, keys] and, under a soft-cap, their derivative by the raw score (without the scale)."""
        b, heads, rows, dim = q.shape
        # Heads that share a key head become rows of one product, so keys are never repeated.
        grouped = q.reshape(b, k.shape[1], -1, dim)
        scale = self.scale / (self.temperature if self.softcap is None else self.softcap)
        scores = torch.matmul(grouped * scale, k.transpose(-1, -2)).view(b, heads, rows, k.shape[2])
        if self.softcap is None:
            return scores, None
        slope = 1 - scores.tanh_().square()
        return scores.mul_(self.softcap / self.temperature), slope


@dataclass(frozen=True)
class Rows:
    """What every query row sees: the keys first..last of its own row that the key mask keeps. All on the CPU."""

    first: Int[Tensor, "B S"]
    last: Int[Tensor, "B S"]
    keep: Bool[Tensor, "B S"]  # rows that count and see a key
    key_mask: Bool[Tensor, "B S"] | None
    segment: Int[Tensor, "B S"] | None  # which segment each token is in

    @classmethod
    def of(cls, b: int, s: int, causal: bool, window: int | None, masks: Masks) -> "Rows":
        cu_seqlens, key_mask, row_mask = masks
        position = torch.arange(s).expand(b, s)
        first, end, segment = torch.zeros(b, s, dtype=torch.long), torch.full((b, s), s), None
        if cu_seqlens is not None:
            bounds = cu_seqlens.long().cpu()
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
        return cls(first, end - 1, keep, key_mask, segment)

    def tiles(self, heads: int, device: str) -> Iterator[tuple[slice, list[tuple[Tensor, slice]]]]:
        """Batch rows that go together, and for each their tiles: query positions [rows] and a range of keys."""
        b, s = self.keep.shape
        budget = TILE_SCORES.get(device, TILE_SCORES["cpu"])
        together = max(1, budget // max(1, heads * s * s)) if self.segment is None else 1
        for start in range(0, b, together):
            rows = slice(start, min(start + together, b))
            positions = self.keep[rows].any(0).nonzero().flatten()
            tiles: list[tuple[Tensor, slice]] = []
            for part in positions.split(self._documents(start, positions)):
                lo = self.first[rows][:, part].amin(0).tolist()
                hi = self.last[rows][:, part].amax(0).tolist()
                done = 0
                while done < len(part):
                    count = _rows_that_fit(lo, hi, done, budget // (heads * (rows.stop - rows.start)))
                    tile, done = part[done : done + count], done + count
                    tiles.append((tile, slice(lo[done - count], hi[done - 1] + 1)))
            if tiles:
                yield rows, tiles

    def _documents(self, row: int, positions: Tensor) -> list[int]:
        """How many of these query positions to take at a time: a few short segments, or a single long one."""
        if self.segment is None or not len(positions):
            return [len(positions)]
        sizes, size = [], 0
        for length in torch.unique_consecutive(self.segment[row][positions], return_counts=True)[1].tolist():
            size += length
            if size >= _DOCUMENT_ROWS:
                sizes.append(size)
                size = 0
        return [*sizes, size] if size else sizes

    def visible(self, rows: slice, tile: Tensor, keys: slice, device: torch.device) -> Bool[Tensor, "b 1 rows keys"]:
        key = torch.arange(keys.start, keys.stop, device=device)
        first = self.first[rows][:, tile].to(device, non_blocking=True)[:, None, :, None]
        last = self.last[rows][:, tile].to(device, non_blocking=True)[:, None, :, None]
        visible = (key >= first) & (key <= last)
        if self.key_mask is not None:
            visible &= self.key_mask[rows, keys].to(device, non_blocking=True)[:, None, None, :]
        return visible


def _rows_that_fit(lo: list[int], hi: list[int], start: int, budget: int) -> int:
    """How many query rows from `start` on make a tile of at most `budget` scores a head, but at least 8.

    Args:
        lo: by row, the first key that it sees; never falls.
        hi: the last.
    """
    left = len(lo) - start
    fit = bisect_right(range(1, left + 1), budget, key=lambda rows: rows * (hi[start + rows - 1] - lo[start] + 1))
    return min(left, max(8, fit))


def _log_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Log-probabilities; a hidden key has _UNSEEN in both maps, so their difference there is exactly 0."""
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 4)
    return torch.log_softmax(scores, dim=-1).masked_fill_(hidden, _UNSEEN)


def _tile_divergence(
    log_s: Tensor, log_t: Tensor, head_map: Tensor, kind: Kind, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Divergence of every row [B, Hs, rows] and its gradient by the student's scores [B, Hs, rows, keys].

    A group of teacher heads: the mean of both over the group. Overwrites the maps.
    """
    group = head_map.shape[1]
    if group == 1 and torch.equal(head_map[:, 0], torch.arange(log_t.shape[1])):
        return divergence_and_gradient(log_s, log_t, kind, 0.0, with_gradient)
    divergence, gradient = torch.zeros_like(log_s[..., 0]), torch.zeros_like(log_s) if with_gradient else None
    for heads in head_map.to(log_t.device, non_blocking=True).unbind(1):
        rows, by_scores = divergence_and_gradient(log_s.clone(), log_t[:, heads], kind, 0.0, with_gradient)
        divergence.add_(rows, alpha=1 / group)
        if gradient is not None and by_scores is not None:
            gradient.add_(by_scores, alpha=1 / group)
    return divergence, gradient


def losses_and_gradients(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    student: Scores,
    teacher: Scores,
    rows: Rows,
    head_map: Tensor,
    kind: Kind,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients by q_s and k_s, while a tile is at hand: four products instead of six, and backward
    needs neither the teacher's tensors nor the student's, only what this returns."""
    dtype = torch.float64 if q_s.dtype == torch.float64 else torch.float32
    # fp16 would lose small gradients before the loss scale of backward reaches them.
    stored = torch.float32 if q_s.dtype == torch.float16 else q_s.dtype
    heads = q_s.shape[1]
    total = torch.zeros((), dtype=dtype, device=q_s.device)
    dq = torch.zeros_like(q_s, dtype=stored) if with_gradient else None
    dk = torch.zeros_like(k_s, dtype=stored) if with_gradient else None
    with torch.autocast(q_s.device.type, enabled=False):
        for batch, tiles in rows.tiles(max(heads, q_t.shape[1]), q_s.device.type):
            k_student, k_teacher = k_s[batch].to(dtype), k_t[batch].to(dtype)
            dk_batch = torch.zeros_like(k_student)
            for tile, keys in tiles:
                index = tile.to(q_s.device, non_blocking=True)
                hidden = ~rows.visible(batch, tile, keys, q_s.device)
                weight = rows.keep[batch][:, tile].to(q_s.device, dtype, non_blocking=True)[:, None, :] / heads
                q_rows = q_s[batch].index_select(2, index).to(dtype)
                q_teacher = q_t[batch].index_select(2, index).to(dtype)
                log_t = _log_softmax(teacher(q_teacher, k_teacher[:, :, keys])[0], hidden)
                scores, slope = student(q_rows, k_student[:, :, keys])
                log_s = _log_softmax(scores, hidden)
                divergence, gradient = _tile_divergence(log_s, log_t, head_map, kind, with_gradient)
                total += (divergence * weight).sum()
                if dq is None or gradient is None:
                    continue
                if kind == "reverse":  # q * row there; forward's q - p is 0 by itself
                    gradient.masked_fill_(hidden, 0.0)
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
    return total, dq, dk
