"""FSDP2 as Lightning runs it, with a say in when gradients are reduced."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy`, which can reduce gradients once per optimizer step, as DDP does.

    Args:
        sync_each_batch: Reduce gradients over the ranks after every micro-batch. False reduces them once, after the
            last one of the step: with accumulation the network carries a fraction, but between micro-batches every
            rank holds the whole gradients of what trains (4 bytes a parameter in bf16-mixed and fp32), not its shard.
        kwargs: Those of `ModelParallelStrategy`: data_parallel_size, tensor_parallel_size, ...
    """

    def __init__(self, sync_each_batch: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sync_each_batch = sync_each_batch

    @contextmanager
    def block_backward_sync(self) -> Generator:
        """Lightning runs every micro-batch but a step's last one in here, whether its window is complete or not."""
        assert self.model is not None
        units = [] if self.sync_each_batch else [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)
