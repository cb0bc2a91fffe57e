"""Divergences between two distributions over the vocabulary, row by row: the formulas, and nothing else."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]


def divergence_rows(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """T² times the divergence of each row, differentiable in both logits. A logit of -inf is a token that is not there.

    forward: KL(teacher || student). reverse: KL(student || teacher). jsd, with M = beta * teacher + (1 - beta) *
    student: beta * KL(teacher || M) + (1 - beta) * KL(student || M), which is 0 at beta 0 and 1.
    """
    if temperature != 1.0:
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    log_q, log_p = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    if kind == "forward":
        rows = _kl(log_p, log_q)
    elif kind == "reverse":
        rows = _kl(log_q, log_p)
    elif beta in (0.0, 1.0):
        rows = 0.0 * _kl(log_p, log_q)
    else:
        log_beta, log_rest = torch.tensor([beta, 1.0 - beta], dtype=torch.float64).log().tolist()
        log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
        rows = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    return temperature**2 * rows


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row; a token that a does not have adds nothing, whatever b says."""
    absent = log_a == -torch.inf
    difference = (log_a - log_b).masked_fill(absent, 0.0)
    return (log_a.exp() * difference).sum(-1)


def check_divergence(kind: str, beta: float, temperature: float) -> None:
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"kind must be 'forward', 'reverse' or 'jsd', got {kind!r}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
