"""A teacher that is known by its k likeliest tokens: they and one more outcome, the tail, which holds all others."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_itk.losses.chunked import Head, TokenScores, chunk_rows, chunked_rows, project
from lightning_itk.losses.divergence import Divergence, divergence_rows
from lightning_itk.losses.token import LossParts, linear_kl_parts


class TopK(NamedTuple):
    """A teacher's k likeliest next tokens, row by row."""

    ids: Int[Tensor, "N k"]  # the likeliest first
    log_probs: Float[Tensor, "N k+1"]  # of these tokens and, last, of all others together; at `temperature`
    nll: Float[Tensor, " N"]  # of the right token, at temperature 1
    vocab: int  # the teacher's
    temperature: float = 1.0

    def scores(self, targets: Int[Tensor, " N"], max_scratch_bytes: int | None = None) -> TokenScores:
        """What the teacher thinks of the right tokens, which are those that `nll` was taken of."""
        return TokenScores(self.nll, self.ids[:, 0], None)


@torch.no_grad()
def top_k(
    hidden: Float[Tensor, "N H"], head: Head, targets: Int[Tensor, " N"], k: int, temperature: float = 1.0
) -> TopK:
    """The k likeliest tokens of hidden states, without holding the logits.

    Args:
        hidden: the head's input.
        head: weight, bias, scale and soft-cap.
        targets: the right next tokens.
        k: how many tokens to keep, fewer than there are.
        temperature: divides the logits.

    Raises:
        ValueError: k is not between 1 and the number of tokens - 1.
    """
    vocab = head.weight.shape[0]
    if not 1 <= k < vocab:
        raise ValueError(f"k is {k}, expected 1 to {vocab - 1}: the teacher has {vocab} tokens")
    head, parts = head.prepared(hidden), []
    size = chunk_rows(vocab, hidden.device.type)
    for rows, right in zip(hidden.split(size), targets.split(size), strict=True):
        with torch.autocast(hidden.device.type, enabled=False):
            logits = project(rows, head)
            nll = F.cross_entropy(logits, right, reduction="none")
            log_p = torch.log_softmax(logits / temperature, dim=-1)
        likeliest, ids = log_p.topk(k)
        tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        parts.append((ids, torch.cat([likeliest, tail], 1), nll))
    if not parts:
        wide = hidden.new_zeros((0, k + 1), dtype=torch.float32)
        return TopK(targets.new_zeros((0, k)), wide, wide[:, 0], vocab, temperature)
    ids, log_probs, nll = (torch.cat(found) for found in zip(*parts, strict=True))
    return TopK(ids, log_probs, nll, vocab, temperature)


def topk_kl_parts(
    student_hidden: Float[Tensor, "N H"],
    student_head: Head,
    teacher: TopK,
    targets: Int[Tensor, " N"],
    how: Divergence,
    *,
    max_scratch_bytes: int | None = None,
) -> LossParts:
    """`linear_kl_parts` over k + 1 outcomes: the student's tail is all that it gives to other tokens than the k.

    Within the tail the student keeps its own proportions, so it learns from the tail as a whole only. In torch.

    Raises:
        ValueError: `how` has another temperature than the teacher's probabilities.
    """
    if how.temperature != teacher.temperature:
        raise ValueError(
            f"the teacher's top-k probabilities are those of temperature {teacher.temperature:g}, "
            f"the loss has temperature {how.temperature:g}"
        )
    vocab = min(teacher.vocab, student_head.weight.shape[0])

    def chunk(
        student: Tensor, _: Tensor | None, row: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.set_grad_enabled(with_gradient):
            student = student.detach().requires_grad_(with_gradient)
            kl = _divergence(student, teacher.ids[row], teacher.log_probs[row], how)
            with torch.set_grad_enabled(with_gradient and how.ce_weight != 0):
                ce = F.cross_entropy(student, targets[row], reduction="sum")
            terms = [weight * term for weight, term in ((how.ce_weight, ce), (how.kl_weight, kl)) if weight]
            loss = torch.stack(terms).sum() if terms else 0.0 * kl
            gradient = torch.autograd.grad(loss, student)[0].contiguous() if with_gradient else None
        return loss.detach(), torch.stack([ce, kl]).detach(), gradient

    number = torch.arange(len(targets), device=targets.device)
    loss, parts = chunked_rows(chunk, student_hidden, student_head.cut(vocab), None, None, number, 2, max_scratch_bytes)
    return LossParts(loss, parts[0], parts[1])


def _divergence(student: Float[Tensor, "n V"], ids: Tensor, log_p: Tensor, how: Divergence) -> Float[Tensor, ""]:
    log_q = torch.log_softmax(student / how.temperature, dim=-1)
    known = ids < log_q.shape[1]  # the student may lack tokens that pad the teacher's vocabulary
    ids = ids.masked_fill(~known, 0)
    outcomes = torch.cat([log_q.gather(1, ids), _outside(log_q, ids, known)], 1)
    gone = F.pad(~known, (0, 1))
    outcomes, log_p = (values.masked_fill(gone, -torch.inf) for values in (outcomes, log_p.to(log_q.dtype)))
    return how.temperature**2 * divergence_rows(outcomes, log_p, how.kind, how.beta).sum()


def _outside(log_q: Tensor, ids: Tensor, known: Bool[Tensor, "n k"]) -> Float[Tensor, "n 1"]:
    """The logarithm of what all tokens but `ids` have together."""
    named = torch.zeros_like(log_q).scatter_add_(1, ids, known.to(log_q.dtype)) > 0
    return log_q.masked_fill(named, -torch.inf).logsumexp(1, keepdim=True)


class TopKGap(NamedTuple):
    """How far the loss of a top-k teacher is from that of the whole one, on some rows.

    Attributes:
        exact: the divergence in mean per row, from all tokens.
        stored: the same from the top k and their tail.
        token_gradient: norm of the error of the gradients by the student's states, row by row, over their own norm.
        summed_gradient: the same of the gradients' sum over all rows: the part that does not average out.
    """

    exact: float
    stored: float
    token_gradient: float
    summed_gradient: float


def topk_gap(
    student: Float[Tensor, "N H"],
    student_head: Head,
    teacher: Float[Tensor, "N Ht"],
    teacher_head: Head,
    stored: TopK,
    targets: Int[Tensor, " N"],
    how: Divergence,
) -> TopKGap:
    """Compare the divergence of a top-k teacher with that of the whole one: values and gradients. N is 1 or more."""
    how = Divergence(how.kind, how.beta, how.temperature)
    found, count = [], len(targets)
    with torch.enable_grad():
        for exact in (True, False):
            states = student.detach().clone().requires_grad_()
            if exact:
                parts = linear_kl_parts(
                    states, student_head.detach(), teacher, teacher_head, targets, how, impl="torch", has_ignored=False
                )
            else:
                parts = topk_kl_parts(states, student_head.detach(), stored, targets, how)
            (gradient,) = torch.autograd.grad(parts.loss, states)
            found.append((parts.kl.item() / count, gradient.double()))
    (exact_value, right), (value, gradient) = found
    error = gradient - right
    summed = error.sum(0).norm() / right.sum(0).norm().clamp_min(1e-30)
    return TopKGap(exact_value, value, float(error.norm() / right.norm().clamp_min(1e-30)), float(summed))
