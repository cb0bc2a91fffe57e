"""Logits of -inf, tokens that a model does not have: the cases, and what a divergence of them is."""

import math

import torch
from torch import Tensor

VOCAB = 100  # more than one block of any kernel in the interpreter
FIRST_BLOCK, ALL_BUT_ONE, ALL_BUT_ANOTHER = range(64), [*range(70), *range(71, 100)], [*range(5), *range(6, 100)]
# What the student lacks, what the teacher lacks.
ABSENT: dict[str, tuple[list[int] | range, list[int] | range]] = {
    "nobody": ([], []),
    "student": ([2, 99], []),
    "teacher": ([], [2, 99]),
    "both": ([2, 99], [2, 99]),
    "each another": ([2], [80]),
    "student more": ([2, 80], [80]),
    "teacher more": ([80], [2, 80]),
    "student a block": (FIRST_BLOCK, []),
    "teacher a block": ([], FIRST_BLOCK),
    "both a block": (FIRST_BLOCK, FIRST_BLOCK),
    "student all but one": (ALL_BUT_ONE, []),
    "teacher all but one": ([], ALL_BUT_ONE),
    "both all but one": (ALL_BUT_ONE, ALL_BUT_ONE),
    "both all but another": (ALL_BUT_ONE, ALL_BUT_ANOTHER),
    "student all": (range(100), []),
    "teacher all": ([], range(100)),
}


def logits(case: str, rows: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits [rows, VOCAB]; the last row's tokens 2 and 99 are so unlikely that fp32 says 0."""
    g = torch.Generator().manual_seed(0)
    pair = [3 * torch.randn(rows, VOCAB, generator=g) for _ in range(2)]
    for x, absent in zip(pair, ABSENT[case], strict=True):
        x[-1, [2, 99]] = -250.0
        x[:, list(absent)] = -torch.inf
    return pair[0].to(dtype), pair[1].to(dtype)


def limit(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Rows of T² x divergence and their gradient by the student's logits: fp64, -inf as the limit of low logits."""
    lacks = [x == -torch.inf for x in (student, teacher)]
    z, zt = (x.double().clamp_min(-1e4 * temperature) for x in (student, teacher))
    z.requires_grad_()
    log_q, log_p = (z / temperature).log_softmax(-1), (zt / temperature).log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    rows = {
        "forward": lambda: kl(log_p, log_q),
        "reverse": lambda: kl(log_q, log_p),
        "jsd": lambda: beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
    }[kind]()
    (gradient,) = torch.autograd.grad(temperature**2 * rows.sum(), z)
    owner, other = lacks[::-1] if kind == "forward" else lacks
    infinite = (~owner & other).any(-1) & (kind != "jsd")
    rows = (temperature**2 * rows.detach()).masked_fill(infinite, torch.inf)
    if kind == "reverse":
        gradient = gradient.masked_fill(infinite[:, None], torch.nan)
    empty = lacks[0].all(-1) | lacks[1].all(-1)
    return rows.masked_fill(empty, torch.nan), gradient.masked_fill(empty[:, None], torch.nan)
