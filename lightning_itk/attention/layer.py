"""What attention maps are made of, as records: a layer's queries and keys, and who sees whom in a batch."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention map is made of: softmax(cap(scaling * q k^T)) over the visible keys."""

    q: Float[Tensor, "B H S D"]
    k: Float[Tensor, "B K S D"]
    scaling: float
    window: int | None  # keys a query sees, itself included
    softcap: float | None
    causal: bool

    def autocast(self) -> "LayerAttention":
        """q and k as attention itself multiplies them: under autocast in its dtype (fp64 stays), else as they are.

        Rotary embeddings leave fp32 under autocast, and `scaled_dot_product_attention` casts that before it multiplies.
        Gradients arrive in the dtypes of before.
        """
        kind = self.q.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)
        q, k = (t if t.dtype == torch.float64 else t.to(dtype) for t in (self.q, self.k))
        return replace(self, q=q, k=k)


class Masks(NamedTuple):
    """Which keys the rows of a batch see beside causality and window, and which rows count; the same in every layer."""

    cu_seqlens: Int[Tensor, "segments+1"] | None = None
    key_mask: Bool[Tensor, "B S"] | None = None
    row_mask: Bool[Tensor, "B S"] | None = None
