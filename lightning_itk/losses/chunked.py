"""A loss over vocabulary logits that are made, used and dropped chunk by chunk, with the gradients made on the way.

This is the torch engine under the `linear_*` losses: the CPU path, and the truth that the Triton kernels are compared
with. It works for any function of the logits that can tell its gradient, by autograd if need be.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itk.batch import IGNORE_INDEX
from lightning_itk.losses.head import Head as Head
from lightning_itk.losses.head import product, unshape_gradient
from lightning_itk.losses.head import project as project

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""fp32 logits of one chunk: 64 MiB, and 512 MiB on a GPU, where every chunk reads and writes the whole gradient of the
head. One such tensor per model lives at a time."""
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
"""Logits that become losses and gradients together, a few such tensors at a time: so few that a CPU keeps them in its
cache (1 MiB), so many that a GPU does not wait for launches."""
_BLOCK_TENSORS = 8
"""Tensors of a block that live at once where a loss, both distributions and their gradients are made of it."""


def check_scratch(max_scratch_bytes: int | None) -> None:
    """Refuse a bound on a loss's memory that is none."""
    if max_scratch_bytes is not None and not max_scratch_bytes > 0:
        raise ValueError(f"max_scratch_bytes must be positive (or None), got {max_scratch_bytes}")


def chunk_rows(vocab: int, device: str = "cpu", max_scratch_bytes: int | None = None, logit_bytes: int = 10) -> int:
    """Rows per chunk, so that its tensors have about CHUNK_ELEMENTS each whatever the vocabulary.

    Args:
        max_scratch_bytes: of a call; chunks get three quarters of it, but always one row.
        logit_bytes: what a chunk holds for each logit of the student, the teacher's own included.
    """
    rows = max(16, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // vocab)
    return rows if max_scratch_bytes is None else max(1, min(rows, max_scratch_bytes * 3 // 4 // (vocab * logit_bytes)))


def _block_rows(vocab: int, device: str, max_scratch_bytes: int | None = None, itemsize: int = 4) -> int:
    """Rows that become losses and gradients together; under a bound they get the quarter that chunks leave."""
    rows = max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"]) // vocab)
    if max_scratch_bytes is None:
        return rows
    return max(1, min(rows, max_scratch_bytes // 4 // (vocab * itemsize * _BLOCK_TENSORS)))


class TokenScores(NamedTuple):
    """What a model thinks of the right next tokens, row by row.

    Attributes:
        nll: negative log-likelihood of the label in nats; 0 where the label is -100.
        top1: the likeliest token.
        rank: 1 + the number of tokens with a higher logit than the label; 0 where the label is -100, None if not asked.
    """

    nll: Float[Tensor, " N"]
    top1: Int[Tensor, " N"]
    rank: Int[Tensor, " N"] | None


@torch.no_grad()
def linear_token_scores(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"] | Head,
    labels: Int[Tensor, " N"],
    *,
    ranks: bool = False,
    max_scratch_bytes: int | None = None,
) -> TokenScores:
    """Per-token loss, likeliest token and, if asked for, the label's rank, without holding the logits.

    Args:
        hidden: the head's input.
        head: its weight, or a `Head` with bias, scale and soft-cap.
        labels: already aligned with the rows (shifted); -100 = none.
        max_scratch_bytes: bounds the logits that are held at a time, and what is made of them.

    Raises:
        ValueError: not one label for each row, or a bound that is not positive.
    """
    check_scratch(max_scratch_bytes)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels have shape {list(labels.shape)} but there are {hidden.shape[0]} rows")
    head = Head.of(head).prepared(hidden)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    nll = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
    top1 = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    rank = torch.zeros_like(top1) if ranks else None
    logit_bytes = 3 * wide.itemsize  # logits, their logarithms, and where a label's rank is counted
    size = chunk_rows(head.weight.shape[0], hidden.device.type, max_scratch_bytes, logit_bytes)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits, label = project(hidden[rows], head), labels[rows]
        ignored = label == IGNORE_INDEX
        right = logits.gather(1, label.masked_fill(ignored, 0)[:, None])
        largest = logits.amax(1, keepdim=True)
        total = (logits - largest).exp_().sum(1)
        nll[rows] = (total.log_() - (right - largest)[:, 0]).masked_fill_(ignored, 0.0).to(wide)
        top1[rows] = logits.argmax(-1)
        if rank is not None:
            higher = (logits > right).sum(1)
            rank[rows] = (1 + higher).masked_fill(ignored, 0)
    return TokenScores(nll, top1, rank)


# (student's logits, teacher's logits | None, labels, with_gradient)
#   -> (summed loss, [parts], gradient of the loss by the student's logits | None); the logits are not overwritten.
ChunkLoss = Callable[[Tensor, Tensor | None, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]


def by_autograd(row_loss: Callable[[Tensor, Tensor | None, Tensor], Tensor]) -> ChunkLoss:
    """A chunk's loss from any differentiable loss of each row."""

    def summed(
        student: Tensor, teacher: Tensor | None, labels: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.set_grad_enabled(with_gradient):
            student = student.detach().requires_grad_(with_gradient)
            total = row_loss(student, teacher, labels).sum()
            # Contiguous: the gradient of a plain sum is one number, expanded, and will be scaled in place.
            gradient = torch.autograd.grad(total, student)[0].contiguous() if with_gradient else None
        return total.detach(), total.detach()[None], gradient

    return summed


Wanted = tuple[bool, bool, bool]  # whether hidden, weight and bias get a gradient
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # theirs; None where not wanted


def chunked_rows(
    row_loss: ChunkLoss,
    hidden: Float[Tensor, "N H"],
    head: Head | None,
    teacher_hidden: Float[Tensor, "N Ht"] | None,
    teacher_head: Head | None,
    labels: Tensor,
    parts: int = 1,
    max_scratch_bytes: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " parts"]]:
    """Sum of `row_loss` over all rows, differentiable in `hidden`, `head.weight` and `head.bias`.

    Args:
        row_loss: see `ChunkLoss`.
        hidden: the head's input, or the logits themselves where `head` is None.
        teacher_hidden: likewise, or None for a loss without a teacher.

    Returns:
        The loss and the summed parts (detached).
    """
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    with_grad = torch.is_grad_enabled()  # inside a Function, requires_grad does not tell
    options = (labels, parts, max_scratch_bytes, with_grad)
    return _ChunkedRows.apply(hidden, weight, bias, row_loss, head, teacher_hidden, teacher_head, *options)


def _one_chunk(
    row_loss: ChunkLoss,
    hidden: Tensor,
    student: Head | None,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    wide: torch.dtype,
    with_gradient: bool,
    size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and parts of some rows, and the gradient by hidden @ weight.T + bias, made `size` rows at a time.

    All else is gone when it returns.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        teacher_logits = None
        if teacher_hidden is not None:
            teacher_logits = teacher_hidden.to(wide) if teacher is None else project(teacher_hidden, teacher)
        if student is None:
            return row_loss(hidden.to(wide), teacher_logits, labels, with_gradient)
        logits = project(hidden, student)
        losses, parts = [], []
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            own_teacher = None if teacher_logits is None else teacher_logits[rows]
            loss, own_parts, gradient = row_loss(logits[rows], own_teacher, labels[rows], with_gradient)
            losses.append(loss)
            parts.append(own_parts)
            if gradient is not None:  # takes the place of its logits
                logits[rows] = unshape_gradient(gradient, logits[rows], student)
        return torch.stack(losses).sum(), torch.stack(parts).sum(0), logits if with_gradient else None


def losses_and_gradients(
    row_loss: ChunkLoss,
    hidden: Tensor,
    head: Head | None,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    *,
    parts: int,
    wanted: Wanted,
    max_scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Gradients]:
    """`chunked_rows` without autograd: loss, summed parts and the gradients of the loss, for heads that are prepared.

    The gradients by weight and bias are in fp32 (fp64), whatever the dtypes of weight and bias.
    """
    need_logits = any(wanted)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    sums = torch.zeros(parts, dtype=wide, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = d_bias = None
    if head is not None:
        d_weight = torch.zeros_like(head.weight, dtype=wide) if wanted[1] else None
        d_bias = torch.zeros_like(head.bias, dtype=wide) if wanted[2] and head.bias is not None else None

    vocab, device = hidden.shape[1] if head is None else head.weight.shape[0], hidden.device.type
    block = size = _block_rows(vocab, device, max_scratch_bytes, wide.itemsize)
    if head is not None:
        narrow = 0 if head.weight.dtype == wide or not need_logits else head.weight.dtype.itemsize
        models = 1 if teacher_hidden is None else 2
        size = chunk_rows(vocab, device, max_scratch_bytes, models * wide.itemsize + narrow)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        teacher_rows = None if teacher_hidden is None else teacher_hidden[rows]
        chunk_loss, chunk_parts, d_raw = _one_chunk(
            row_loss, hidden[rows], head, teacher_rows, teacher, labels[rows], wide, need_logits, block
        )
        loss += chunk_loss
        sums += chunk_parts
        if d_raw is None:
            continue
        if head is None:
            assert d_hidden is not None
            d_hidden[rows] = d_raw.to(hidden.dtype)
            continue
        if d_bias is not None:
            d_bias += d_raw.sum(0)
        d_raw = d_raw.to(head.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if d_hidden is not None:
                d_hidden[rows] = torch.mm(d_raw, head.weight).to(hidden.dtype)
            if d_weight is not None and d_raw.dtype == d_weight.dtype:
                d_weight.addmm_(d_raw.t(), hidden[rows].to(d_raw.dtype))
            elif d_weight is not None:
                d_weight += product(d_raw.t(), hidden[rows].to(d_raw.dtype).t())
        del d_raw  # before the next chunk is made
    return loss, sums, (d_hidden, d_weight, d_bias)


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · upstream, rounded once: a product with a bf16 tensor would first round the number to bf16."""
    if gradient.element_size() > 2:
        return (gradient * upstream).to(dtype)
    return (gradient.float() * upstream).to(dtype)


class _ChunkedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, row_loss, head, teacher_hidden, teacher_head, labels, parts, scratch, train):
        loss, sums, gradients = losses_and_gradients(
            row_loss,
            hidden,
            None if head is None else head.prepared(hidden),
            teacher_hidden,
            None if teacher_head is None else teacher_head.prepared(teacher_hidden),
            labels,
            parts=parts,
            wanted=tuple(train and need for need in ctx.needs_input_grad[:3]),
            max_scratch_bytes=scratch,
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else scaled(g, upstream, dtype) for g, dtype in saved), *(None,) * 8
