"""The losses of a GPU, run under fake tensors of a CPU: the host code of Triton's, or torch's with a GPU's chunks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lightning_itk.losses import chunked, head, operators, token
from lightning_itk.planning.setting import Setting
from lightning_itk.planning.tracker import StepTracker

_BLOCKS = 256  # more blocks than that are not run one by one


@contextmanager
def losses_of(setting: Setting, rows: int, vocab: int, tracker: StepTracker) -> Iterator[None]:
    """The linear losses as they run on a setting's device: their chunks, buffers and products.

    Args:
        rows: response rows of a micro-batch.
    """
    with ExitStack() as stack:
        block = chunked.BLOCK_ELEMENTS["cuda" if setting.gpu else "cpu"]
        if setting.triton:
            stack.enter_context(_triton(tracker))
        if setting.gpu:
            stack.enter_context(_torch_of_gpu(tracker))
        if rows * vocab > _BLOCKS * block:
            stack.enter_context(patch.object(chunked, "_one_chunk", _in_place))
        yield


@contextmanager
def _triton(tracker: StepTracker) -> Iterator[None]:
    """All but the kernels themselves runs; those make no tensors, and of their work the memory traffic counts."""
    from lightning_itk.kernels import linear_chunks, linear_kl

    def matmul(a: Tensor, b: Tensor, out: Tensor, unit: float = 1.0, *, wide: bool = False, **_: Any) -> None:
        made = out.new_empty(out.shape, dtype=torch.float32) if wide and out.dtype != torch.float32 else None
        tracker.worked(2 * a.numel() * b.shape[1], a, b, out, *([] if made is None else [made, made]))

    def token_loss(student: Tensor, teacher: Tensor | None, _: Any, *, grad: Tensor | None, **__: Any) -> None:
        tracker.worked(0, *(tensor for tensor in (student, teacher, grad) if tensor is not None))

    with ExitStack() as stack:
        for where, name, instead in (
            (token, "resolve_impl", lambda *_: "triton"),
            (linear_kl, "require", lambda _: None),
            (linear_kl, "eager", lambda _: True),
            (linear_kl, "fused_is_faster", lambda *_, **__: False),
            (linear_chunks, "matmul", matmul),
            (linear_chunks, "token_loss", token_loss),
        ):
            stack.enter_context(patch.object(where, name, instead))
        yield


@contextmanager
def _torch_of_gpu(tracker: StepTracker) -> Iterator[None]:
    """Chunks of a GPU's size, and half-precision inputs that are multiplied into fp32 as they are."""

    def half_stays(hidden: Tensor, weight: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled("cpu") and hidden.dtype != torch.float64:
            return torch.get_autocast_dtype("cpu")
        return torch.promote_types(hidden.dtype, weight.dtype)

    multiply = head.product

    def into_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden.to(weight.dtype)
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return multiply(hidden, weight)
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
        tracker.worked(2 * hidden.numel() * weight.shape[0], hidden, weight, logits)  # a product that CPUs lack
        return logits

    with ExitStack() as stack:
        for sizes in (chunked.CHUNK_ELEMENTS, chunked.BLOCK_ELEMENTS):
            stack.enter_context(patch.dict(sizes, cpu=sizes["cuda"]))
        for where in (head, operators):
            stack.enter_context(patch.object(where, "matmul_dtype", half_stays))
        for where in (head, chunked):
            stack.enter_context(patch.object(where, "product", into_fp32))
        yield


def _in_place(_: Any, hidden: Tensor, student: Any, states: Any, teacher: Any, *more: Any) -> Any:
    """`chunked._one_chunk` where blocks would be many: logits become their gradient, blocks are small beside them."""
    *_, with_gradient, _ = more
    theirs = None if states is None else chunked.project(states, teacher)
    logits = chunked.project(hidden, student)
    del theirs
    return logits.new_zeros(()), logits.new_zeros(()), logits if with_gradient else None
