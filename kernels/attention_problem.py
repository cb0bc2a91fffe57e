"""One attention loss as the kernels see it: shapes, strides and tile, and the launches."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_backward import attention_dk_kernel, attention_dq_kernel
from .attention_forward import Mask, Model, attention_forward_kernel
from .attention_fused import attention_fused_kernel, sum_parts_kernel
from .launch import KINDS, LOG2E, Tile, architecture, attention_tile, fused_splits, fused_tile, guard

FUSED_BACKWARD: bool = False  # dq and dk in one kernel, where `fused_tile` has one; README.md says what decided


class Problem(NamedTuple):
    """What every kernel of one call shares."""

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor
    head_map: Tensor
    spans: Tensor | None
    key_mask: Tensor | None
    row_mask: Tensor | None
    scale_s: float
    scale_t: float
    cap_s: float | None
    cap_t: float | None
    causal: bool
    window: int
    reverse: bool
    temperature: float
    fixed: bool

    def tile(self, kernel: str) -> Tile:
        return attention_tile(architecture(self.q_s.device), kernel, *self._demands())

    def fused_tile(self) -> Tile | None:
        masks = (self.spans, self.key_mask, self.row_mask)
        bare = self.causal and not (self.window or self.reverse) and all(x is None for x in masks)
        return fused_tile(architecture(self.q_s.device), *self._demands(), bare)

    def _demands(self) -> tuple[int, int, bool]:
        """Padded head dim, bytes of an element (the teacher's too) and whether the problem is plain."""
        dims = (self.q_s.shape[-1], self.q_t.shape[-1])
        one_to_one = self.head_map.shape[1] == 1 and self.fixed
        plain = one_to_one and not (self.cap_s or self.cap_t) and all(d == _padded(d) for d in dims)
        return max(map(_padded, dims)), self.q_s.element_size(), plain

    def arguments(self, tile: Tile) -> dict[str, Any]:
        """What every kernel takes, by name."""
        starts, ends = (None, None) if self.spans is None else self.spans.unbind()
        masks = (starts, ends, self.key_mask, self.row_mask)
        return {
            "student": self._model(self.q_s, self.k_s, self.scale_s, self.cap_s),
            "teacher": self._model(self.q_t, self.k_t, self.scale_t, self.cap_t),
            "mask": Mask(*masks, self.q_s.shape[2], self.window or None, tl.constexpr(self.causal)),
            "head_map_ptr": self.head_map,
            "to_log2": LOG2E.value / self.temperature,
            "G": self.head_map.shape[1],
            "KIND": KINDS["reverse" if self.reverse else "forward"],
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def _model(self, q: Tensor, k: Tensor, scale: float, cap: float | None) -> Model:
        constants = (q.shape[1] // k.shape[1], q.shape[-1], _padded(q.shape[-1]))
        scalars = (scale, float(cap) if cap else None)
        return Model(q, k, q.stride()[:3], k.stride()[:3], *scalars, *map(tl.constexpr, constants))

    def gradient_factors(self) -> dict[str, float]:
        """`unit`, on dscores before they are rounded (fp16 loses what is below 6e-8), and `factor`, on dq and dk."""
        heads, pairs = self.q_s.shape[1], self.head_map.shape[1]
        unit = 8192.0 / pairs if self.q_s.dtype == torch.float16 else 1.0
        per_log = 1.0 / LOG2E.value if self.reverse else 1.0
        return {"unit": unit, "factor": self.scale_s * per_log / (self.temperature * pairs * heads * unit)}


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """KL rows [B, Hs, S] (mean over pairs), lse_s [B, Hs, S], lse_t [B, Hs, G, S] (log2)."""
    batch, heads, length = p.q_s.shape[:3]
    pairs, tile = p.head_map.shape[1], p.tile("forward")
    kl = torch.empty(batch, heads, pairs, length, dtype=torch.float32, device=p.q_s.device)
    lse_t, lse_s = torch.empty_like(kl), torch.empty_like(kl[:, :, 0], memory_format=torch.contiguous_format)
    grid = (triton.cdiv(length, tile.block_m), heads * pairs, batch)
    with guard(p.q_s):
        attention_forward_kernel[grid](kl_ptr=kl, lse_s_ptr=lse_s, lse_t_ptr=lse_t, **p.arguments(tile))
    return kl.mean(2) if pairs > 1 else kl[:, :, 0].clone(), lse_s, lse_t


def query_gradient(p: Problem, kl: Tensor, lse_s: Tensor, lse_t: Tensor, upstream: Tensor | None) -> Tensor:
    """dq [B, Hs, S, Ds]; without `upstream` it is for upstream 1 and the KL rows are written into `kl`."""
    batch, heads, length = p.q_s.shape[:3]
    tile = p.tile("dq")
    dq = torch.empty(p.q_s.shape, dtype=p.q_s.dtype, device=p.q_s.device)
    with guard(p.q_s):
        attention_dq_kernel[(triton.cdiv(length, tile.block_m), heads, batch)](
            kl_ptr=kl, lse_s_ptr=lse_s, lse_t_ptr=lse_t, upstream_ptr=upstream, dq_ptr=dq,
            **p.gradient_factors(), **p.arguments(tile),
        )  # fmt: skip
    return dq


def key_gradient(p: Problem, kl: Tensor, lse_s: Tensor, lse_t: Tensor, upstream: Tensor) -> Tensor:
    """dk [B, Hkv, S, Ds]."""
    batch, heads, length = p.k_s.shape[:3]
    tile = p.tile("dk")
    dk = torch.empty(p.k_s.shape, dtype=p.k_s.dtype, device=p.k_s.device)
    with guard(p.q_s):
        attention_dk_kernel[(triton.cdiv(length, tile.block_n), heads, batch)](
            kl_ptr=kl, lse_s_ptr=lse_s, lse_t_ptr=lse_t, upstream_ptr=upstream, dk_ptr=dk, FIXED=p.fixed,
            **_kept_blocks(p.row_mask, tile.block_m), **p.gradient_factors(), **p.arguments(tile),
        )  # fmt: skip
    return dk


def both_gradients(p: Problem, kl: Tensor, lse_s: Tensor, lse_t: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """dq and dk, from one kernel where `FUSED_BACKWARD` asks for it and the problem fits."""
    batch, heads, length = p.k_s.shape[:3]
    tile = p.fused_tile() if FUSED_BACKWARD and p.q_s.numel() else None
    splits = 0
    if tile is not None:
        splits = fused_splits(p.q_s.device, tile, batch * heads, triton.cdiv(length, tile.block_n), 4 * p.q_s.numel())
    if tile is None or splits == 0:
        return query_gradient(p, kl, lse_s, lse_t, upstream), key_gradient(p, kl, lse_s, lse_t, upstream)
    parts = torch.zeros(splits, *p.q_s.shape, dtype=torch.float32, device=p.q_s.device)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (p.q_s, p.k_s))
    factors, block = p.gradient_factors(), 1024
    with guard(p.q_s):
        attention_fused_kernel[(splits, heads, batch)](
            kl_ptr=kl, lse_s_ptr=lse_s, lse_t_ptr=lse_t, upstream_ptr=upstream, parts_ptr=parts, dk_ptr=dk,
            FIXED=p.fixed, **_kept_blocks(p.row_mask, tile.block_m), **factors, **p.arguments(tile),
        )  # fmt: skip
        sum_parts_kernel[(triton.cdiv(dq.numel(), block),)](
            parts, upstream, dq, factors["factor"], splits, dq.numel(), BLOCK=block
        )
    return dq, dk


def _kept_blocks(row_mask: Tensor | None, block_m: int) -> dict[str, Tensor | None]:
    """Lists of the query blocks that hold a kept row, so that the others cost nothing."""
    if row_mask is None:
        return {"blocks_ptr": None, "ranks_ptr": None}
    padded = torch.nn.functional.pad(row_mask, (0, -row_mask.shape[1] % block_m))
    active = padded.unflatten(1, (padded.shape[1] // block_m, block_m)).amax(-1) != 0  # a batch may be empty
    blocks = torch.argsort(~active, dim=1, stable=True).to(torch.int32)
    ranks = torch.nn.functional.pad(active.cumsum(1), (1, 0)).to(torch.int32)
    return {"blocks_ptr": blocks, "ranks_ptr": ranks}
