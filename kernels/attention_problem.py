"""One attention loss as the kernels see it: shapes, strides and tile, and the three launches."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .attention_backward import attention_dk_kernel, attention_dq_kernel
from .attention_forward import attention_forward_kernel
from .launch import INTERPRET, LOG2E, Tile, architecture, attention_tile, guard


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
        dims = (self.q_s.shape[-1], self.q_t.shape[-1])
        itemsize = max(self.q_s.element_size(), self.q_t.element_size())
        one_to_one = self.head_map.shape[1] == 1 and self.fixed
        plain = one_to_one and not (self.cap_s or self.cap_t) and all(d == _padded(d) for d in dims)
        return attention_tile(architecture(self.q_s.device), kernel, max(map(_padded, dims)), itemsize, plain)

    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs and masks; a disabled mask is a pointer that no kernel reads."""
        q_s, spans = self.q_s, (self.q_s, self.q_s) if self.spans is None else self.spans.unbind()
        return (
            q_s,
            self.k_s,
            self.q_t,
            self.k_t,
            self.head_map,
            *spans,
            q_s if self.key_mask is None else self.key_mask,
        )

    def numbers(self) -> tuple[float, ...]:
        strides = [x.stride(d) for x in (self.q_s, self.k_s, self.q_t, self.k_t) for d in range(3)]
        to_log2 = LOG2E.value / self.temperature
        caps = (float(self.cap_s or 1.0), float(self.cap_t or 1.0))
        return (*strides, self.q_s.shape[2], self.window, self.scale_s, self.scale_t, *caps, to_log2)

    def options(self, tile: Tile) -> dict[str, object]:
        ds, dt = self.q_s.shape[-1], self.q_t.shape[-1]
        return {
            "G": self.head_map.shape[1],
            "QS": self.q_s.shape[1] // self.k_s.shape[1],
            "QT": self.q_t.shape[1] // self.k_t.shape[1],
            "DS": ds,
            "DT": dt,
            "BLOCK_DS": _padded(ds),
            "BLOCK_DT": _padded(dt),
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "SEGMENTS": self.spans is not None,
            "KEY_MASK": self.key_mask is not None,
            "ROW_MASK": self.row_mask is not None,
            "CAP_S": bool(self.cap_s),
            "CAP_T": bool(self.cap_t),
            "REVERSE": self.reverse,
            "UPCAST": INTERPRET,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def gradient_factors(self) -> tuple[float, float]:
        """Factor on dscores before they are rounded (fp16 loses what is below 6e-8), and factor on dq and dk."""
        heads, pairs = self.q_s.shape[1], self.head_map.shape[1]
        unit = 8192.0 / pairs if self.q_s.dtype == torch.float16 else 1.0
        per_log = 1.0 / LOG2E.value if self.reverse else 1.0
        return unit, self.scale_s * per_log / (self.temperature * pairs * heads * unit)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """KL rows [B, Hs, S] (mean over pairs), lse_s [B, Hs, S], lse_t [B, Hs, G, S] (log2)."""
    batch, heads, length = p.q_s.shape[:3]
    pairs, tile = p.head_map.shape[1], p.tile("forward")
    kl = torch.empty(batch, heads, pairs, length, dtype=torch.float32, device=p.q_s.device)
    lse_t, lse_s = torch.empty_like(kl), torch.empty_like(kl[:, :, 0], memory_format=torch.contiguous_format)
    with guard(p.q_s):
        attention_forward_kernel[(triton.cdiv(length, tile.block_m), heads * pairs, batch)](
            *p.tensors(), p.q_s if p.row_mask is None else p.row_mask, kl, lse_s, lse_t, *p.numbers(), **p.options(tile)
        )
    return kl.mean(2) if pairs > 1 else kl[:, :, 0].clone(), lse_s, lse_t


def query_gradient(p: Problem, kl: Tensor, lse_s: Tensor, lse_t: Tensor, upstream: Tensor | None) -> Tensor:
    """dq [B, Hs, S, Ds]; without `upstream` it is for upstream 1 and the KL rows are written into `kl`."""
    batch, heads, length = p.q_s.shape[:3]
    tile = p.tile("dq")
    dq = torch.empty(p.q_s.shape, dtype=p.q_s.dtype, device=p.q_s.device)
    with guard(p.q_s):
        attention_dq_kernel[(triton.cdiv(length, tile.block_m), heads, batch)](
            *p.tensors(), p.q_s if p.row_mask is None else p.row_mask, kl, lse_s, lse_t,
            kl if upstream is None else upstream, dq, *p.numbers(), *p.gradient_factors(),
            EMIT=upstream is None, **p.options(tile),
        )  # fmt: skip
    return dq


def key_gradient(p: Problem, kl: Tensor, lse_s: Tensor, lse_t: Tensor, upstream: Tensor) -> Tensor:
    """dk [B, Hkv, S, Ds]."""
    batch, heads, length = p.k_s.shape[:3]
    tile = p.tile("dk")
    dk = torch.empty(p.k_s.shape, dtype=p.k_s.dtype, device=p.k_s.device)
    blocks = ranks = p.head_map
    if p.row_mask is not None:  # list the query blocks that hold a kept row, so that the others cost nothing
        padded = torch.nn.functional.pad(p.row_mask, (0, -length % tile.block_m))
        active = padded.view(batch, -1, tile.block_m).amax(-1) != 0
        blocks = torch.argsort(~active, dim=1, stable=True).to(torch.int32)
        ranks = torch.nn.functional.pad(active.cumsum(1), (1, 0)).to(torch.int32)
    with guard(p.q_s):
        attention_dk_kernel[(triton.cdiv(length, tile.block_n), heads, batch)](
            *p.tensors(), blocks, ranks, kl, lse_s, lse_t, upstream, dk, *p.numbers(), *p.gradient_factors(),
            FIXED=p.fixed, **p.options(tile),
        )  # fmt: skip
    return dk
