"""The divergence of every token, without gradients and without holding the logits: for tables of results."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_itk.losses.chunked import chunk_rows
from lightning_itk.losses.divergence import Divergence, divergence_rows
from lightning_itk.losses.head import Head, project


@torch.no_grad()
def linear_token_divergence(
    student_hidden: Float[Tensor, "N Hs"],
    student_head: Float[Tensor, "Vs Hs"] | Head,
    teacher_hidden: Float[Tensor, "N Ht"],
    teacher_head: Float[Tensor, "Vt Ht"] | Head,
    how: Divergence | None = None,
    *,
    max_scratch_bytes: int | None = None,
) -> Float[Tensor, " N"]:
    """T² times the divergence of each token's two distributions, in nats; its sum is `linear_kl_divergence`'s.

    Args:
        student_hidden: the input of the student's head.
        student_head: its weight, or a `Head` with bias, scale and soft-cap.
        teacher_hidden: the input of the teacher's head, at the same tokens.
        teacher_head: likewise. Of two vocabularies the common first part is compared.
        how: kind, beta and temperature; None = KL(teacher || student) at temperature 1. Its weights mean nothing here.
        max_scratch_bytes: bound on the logits that are held at a time; None = as `chunked.CHUNK_ELEMENTS` says.

    Returns:
        fp32, or fp64 where the states are.

    Raises:
        ValueError: not as many rows of both.
    """
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(
            f"there are {len(student_hidden)} rows of the student and {len(teacher_hidden)} of the teacher"
        )
    how = how or Divergence()
    student_head, teacher_head = Head.of(student_head), Head.of(teacher_head)
    vocab = min(student_head.weight.shape[0], teacher_head.weight.shape[0])
    student_head = student_head.cut(vocab).prepared(student_hidden)
    teacher_head = teacher_head.cut(vocab).prepared(teacher_hidden)
    size = chunk_rows(vocab, student_hidden.device.type, max_scratch_bytes, logit_bytes=24)
    rows = []
    for start in range(0, len(student_hidden), size):
        part = slice(start, start + size)
        logits = project(student_hidden[part], student_head), project(teacher_hidden[part], teacher_head)
        rows.append(divergence_rows(*logits, how.kind, how.beta, how.temperature))
    wide = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    return torch.cat(rows) if rows else student_hidden.new_zeros(0, dtype=wide)
