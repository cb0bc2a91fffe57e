"""What attention maps are made of, as records: a layer's queries and keys, and who sees whom in a batch."""

from dataclasses import dataclass
from typing import NamedTuple

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


class Masks(NamedTuple):
    """Which keys the rows of a batch see beside causality and window, and which rows count; the same in every layer."""

    cu_seqlens: Int[Tensor, "segments+1"] | None = None
    key_mask: Bool[Tensor, "B S"] | None = None
    row_mask: Bool[Tensor, "B S"] | None = None
