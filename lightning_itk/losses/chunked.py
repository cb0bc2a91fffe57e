"""A loss over vocabulary logits that are made, used and dropped chunk by chunk, with the gradients made on the way.

This is the torch engine under the `linear_*` losses: the CPU path, and the truth that the Triton kernels are compared
with. It works for any function of the logits that can tell its gradient, by autograd if need be.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itk.batch import IGNORE_INDEX

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""fp32 logits of one chunk: 64 MiB, and 512 MiB on a GPU, where every chunk reads and writes the whole gradient of the
head. One such tensor per model lives at a time."""
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
"""Logits that become losses and gradients together, a few such tensors at a time: so few that a CPU keeps them in its
cache (1 MiB), so many that a GPU does not wait for launches."""


class Head(NamedTuple):
    """An output layer: logits = softcap * tanh(z / softcap) with z = scale * (hidden @ weight.T + bias)."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(head: "Tensor | Head") -> "Head":
        head = head if isinstance(head, Head) else Head(head)
        if head.weight.ndim != 2:
            raise ValueError(f"a head must be [vocab, hidden], got {list(head.weight.shape)}")
        return head

    def detach(self) -> "Head":
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def to(self, device: torch.device) -> "Head":
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def cut(self, vocab: int) -> "Head":
        """The same head for the first `vocab` tokens."""
        if vocab == self.weight.shape[0]:
            return self
        return self._replace(weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab])

    def prepared(self, hidden: Tensor) -> "Head":
        """The detached head in the dtype its matrix product will use for inputs like `hidden`."""
        head, dtype = self.detach(), _matmul_dtype(hidden, self.weight)
        return head._replace(weight=head.weight.to(dtype))


def chunk_rows(vocab: int, device: str = "cpu") -> int:
    """Rows per chunk, so that its tensors have about CHUNK_ELEMENTS each whatever the vocabulary."""
    return max(16, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // vocab)


def _block_rows(vocab: int, device: str) -> int:
    return max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"]) // vocab)


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    # Only CUDA multiplies half-precision inputs into fp32 outputs; elsewhere the inputs are widened.
    return dtype if dtype == torch.float64 or device == "cuda" else torch.float32


def project(hidden: Float[Tensor, "n H"], head: Head) -> Float[Tensor, "n V"]:
    """Logits in fp32 (fp64 for fp64 inputs) of a `prepared` head."""
    return _shape_logits(_product(hidden, head.weight), head)


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    hidden = hidden.to(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return torch.mm(hidden, weight.t())


def _shape_logits(logits: Tensor, head: Head) -> Tensor:
    """In place."""
    if head.bias is not None:
        logits += head.bias.to(logits.dtype)
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _unshape_gradient(gradient: Tensor, logits: Tensor, head: Head) -> Tensor:
    """The gradient by `hidden @ weight.T + bias` from the one by the logits, in place."""
    if head.softcap is not None:
        gradient *= 1 - (logits / head.softcap).square_()
    return gradient.mul_(head.scale) if head.scale != 1.0 else gradient


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
) -> TokenScores:
    """Per-token loss, likeliest token and, if asked for, the label's rank, without holding the logits.

    Args:
        hidden: the head's input.
        head: its weight, or a `Head` with bias, scale and soft-cap.
        labels: already aligned with the rows (shifted); -100 = none.

    Raises:
        ValueError: not one label for each row.
    """
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels have shape {list(labels.shape)} but there are {hidden.shape[0]} rows")
    head = Head.of(head).prepared(hidden)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    nll = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
    top1 = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    rank = torch.zeros_like(top1) if ranks else None
    size = chunk_rows(head.weight.shape[0], hidden.device.type)
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits, label = project(hidden[rows], head), labels[rows]
        nll[rows] = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="none").to(wide)
        top1[rows] = logits.argmax(-1)
        if rank is not None:
            higher = (logits > logits.gather(1, label.clamp_min(0)[:, None])).sum(1)
            rank[rows] = (1 + higher).masked_fill(label == IGNORE_INDEX, 0)
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


def chunked_rows(
    row_loss: ChunkLoss,
    hidden: Float[Tensor, "N H"],
    head: Head | None,
    teacher_hidden: Float[Tensor, "N Ht"] | None,
    teacher_head: Head | None,
    labels: Tensor,
    parts: int = 1,
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
    return _ChunkedRows.apply(
        hidden, weight, bias, row_loss, head, teacher_hidden, teacher_head, labels, parts, with_grad
    )


def _one_chunk(
    row_loss: ChunkLoss,
    hidden: Tensor,
    student: Head | None,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    wide: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and parts of some rows, and the gradient by hidden @ weight.T + bias. All else is gone when it returns."""
    with torch.autocast(hidden.device.type, enabled=False):
        teacher_logits = None
        if teacher_hidden is not None:
            teacher_logits = teacher_hidden.to(wide) if teacher is None else project(teacher_hidden, teacher)
        if student is None:
            return row_loss(hidden.to(wide), teacher_logits, labels, with_gradient)
        logits = project(hidden, student)
        losses, parts = [], []
        size = _block_rows(logits.shape[1], logits.device.type)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            own_teacher = None if teacher_logits is None else teacher_logits[rows]
            loss, own_parts, gradient = row_loss(logits[rows], own_teacher, labels[rows], with_gradient)
            losses.append(loss)
            parts.append(own_parts)
            if gradient is not None:  # takes the place of its logits
                logits[rows] = _unshape_gradient(gradient, logits[rows], student)
        return torch.stack(losses).sum(), torch.stack(parts).sum(0), logits if with_gradient else None


class _ChunkedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, row_loss, head, teacher_hidden, teacher_head, labels, parts, with_grad):
        need_hidden, need_weight, need_bias = (with_grad and need for need in ctx.needs_input_grad[:3])
        need_logits = need_hidden or need_weight or need_bias
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        sums = torch.zeros(parts, dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        student = None if head is None else head.prepared(hidden)
        teacher = None if teacher_head is None else teacher_head.prepared(teacher_hidden)

        rows_of = _block_rows if head is None else chunk_rows
        size = rows_of(hidden.shape[1] if head is None else head.weight.shape[0], hidden.device.type)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            teacher_rows = None if teacher_hidden is None else teacher_hidden[rows]
            chunk_loss, chunk_parts, d_raw = _one_chunk(
                row_loss, hidden[rows], student, teacher_rows, teacher, labels[rows], wide, need_logits
            )
            loss += chunk_loss
            sums += chunk_parts
            if d_raw is None:
                continue
            if student is None:
                assert d_hidden is not None
                d_hidden[rows] = d_raw.to(hidden.dtype)
                continue
            if d_bias is not None:
                d_bias += d_raw.sum(0)
            d_raw = d_raw.to(student.weight.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                if d_hidden is not None:
                    d_hidden[rows] = torch.mm(d_raw, student.weight).to(hidden.dtype)
                if d_weight is not None and d_raw.dtype == d_weight.dtype:
                    d_weight.addmm_(d_raw.t(), hidden[rows].to(d_raw.dtype))
                elif d_weight is not None:
                    d_weight += _product(d_raw.t(), hidden[rows].to(d_raw.dtype).t())
            del d_raw  # before the next chunk is made

        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * upstream).to(weight_dtype)
        if d_bias is not None:
            d_bias = (d_bias * upstream).to(bias_dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None, None
