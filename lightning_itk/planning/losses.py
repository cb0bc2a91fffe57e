"""The losses of a GPU, run under fake tensors of a CPU: its chunks, its products, or Triton's scratch by formula."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from lightning_itk.losses import chunked
from lightning_itk.planning.setting import Setting
from lightning_itk.planning.tracker import StepTracker

if TYPE_CHECKING:
    from lightning_itk.kernels.chunks import ChunkPlan

_BLOCKS = 256  # more blocks than that are not run one by one


@contextmanager
def losses_of(
    setting: Setting, chunks: "ChunkPlan | None", rows: int, vocab: int, tracker: StepTracker
) -> Iterator[None]:
    """The torch losses in the chunks of a GPU, with products of half-precision inputs as there; or in those of Triton's
    formula, where logits become their gradient in place. So they do where blocks would be many: those are small."""
    product = chunked._product

    def half_stays(hidden: Tensor, weight: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled("cpu") and hidden.dtype != torch.float64:
            return torch.get_autocast_dtype("cpu")
        return torch.promote_types(hidden.dtype, weight.dtype)

    def into_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden.to(weight.dtype)
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return product(hidden, weight)
        tracker.flops += 2 * hidden.numel() * weight.shape[0]  # a product that CPUs lack
        return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)

    def in_place(_: Any, hidden: Tensor, student: Any, states: Any, head: Any, __: Any, ___: Any, with_gradient: bool):
        made = None if states is None else chunked.project(states, head)
        logits = chunked.project(hidden, student)
        del made
        return logits.new_zeros(()), logits.new_zeros(()), logits if with_gradient else None

    with ExitStack() as stack:
        block = chunked.BLOCK_ELEMENTS["cuda" if setting.gpu else "cpu"]
        if setting.gpu:
            elements = chunked.CHUNK_ELEMENTS["cuda"] if chunks is None else chunks.rows * vocab
            stack.enter_context(patch.dict(chunked.CHUNK_ELEMENTS, cpu=elements))
            stack.enter_context(patch.dict(chunked.BLOCK_ELEMENTS, cpu=block))
            stack.enter_context(patch.object(chunked, "_matmul_dtype", half_stays))
            stack.enter_context(patch.object(chunked, "_product", into_fp32))
        if chunks is not None or rows * vocab > _BLOCKS * block:
            stack.enter_context(patch.object(chunked, "_one_chunk", in_place))
        yield


def chunks_of(setting: Setting, rows: int, head: Tensor, teacher: bool) -> "ChunkPlan":
    """How Triton would walk the response rows."""
    from lightning_itk.kernels.chunks import plan_chunks
    from lightning_itk.kernels.linear_kl import SCRATCH

    trains, (vocab, width) = head.requires_grad, head.shape
    return plan_chunks(
        rows, vocab, width, setting.itemsize, teacher=teacher, trains_head=trains, max_scratch_bytes=SCRATCH
    )
