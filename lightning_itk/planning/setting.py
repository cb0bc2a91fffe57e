"""What of a run decides its memory, beside its module."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """What of a run decides its memory, beside the module itself.

    Attributes:
        rows: rows of a micro-batch, each as long as `length`.
        response_share: share of the positions that are learned; 1 is the most that can be.
        strategy: single, ddp or fsdp2.
        gpu: count as on a GPU: its chunks, its foreach optimizers.
    """

    rows: int
    length: int
    response_share: float = 1.0
    packing: bool = False
    accumulate: int = 1
    precision: str = "32-true"
    strategy: str = "single"
    ranks: int = 1
    gpu: bool = True
    triton: bool = True
    cached_teacher: bool = False

    @property
    def half(self) -> torch.dtype:
        """The half precision that is meant where one is."""
        return torch.float16 if self.precision.startswith("16") else torch.bfloat16

    @property
    def itemsize(self) -> int:
        """Bytes of a hidden state."""
        return 4 if self.precision == "32-true" else 2
