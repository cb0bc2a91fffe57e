"""Divergences between two distributions over the vocabulary: the formulas, and their gradients in closed form.

A logit of -inf is a token that a model does not have. The rule, here and in the Triton kernels:

* KL(a || b) counts the tokens of a. One that b does not have makes it inf, however small its probability, as it makes a
  cross-entropy whose label the student does not have. JSD is finite always.
* The gradients are the formulas' own: forward, and for a label, q - p is finite also where the loss is inf. Reverse has
  no gradient there: its row is nan.
* A row in which a model has no token at all is nan.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """How a student's next-token distribution is compared with its teacher's, and with the labels beside it.

    Args:
        kind: forward = KL(teacher || student), reverse = KL(student || teacher), or jsd (see `divergence_rows`).
        beta: the teacher's share in the mixture of jsd, in [0, 1].
        temperature: divides both logits; the divergence is multiplied by its square.
        ce_weight: weight of the cross-entropy with the labels, at temperature 1.
        kl_weight: weight of the divergence.
    """

    kind: Kind = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be {_one_of(get_args(Kind))}, got {self.kind!r}")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


def divergence_rows(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    kind: Kind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """T² times the divergence of each row, differentiable in both logits. The head of this file says what -inf means.

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
    elif kind != "jsd":
        raise ValueError(f"there is no formula for kind {kind!r}")
    elif beta in (0.0, 1.0):
        rows = 0.0 * (log_p.exp() + log_q.exp()).sum(-1)
    else:
        log_beta, log_rest = torch.tensor([beta, 1.0 - beta], dtype=torch.float64).log().tolist()
        lowest = torch.finfo(log_q.dtype).min  # for a token that neither has: logaddexp of -inf has no gradient
        log_m = torch.logaddexp(log_p.clamp_min(lowest) + log_beta, log_q.clamp_min(lowest) + log_rest)
        rows = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    return temperature**2 * rows


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row; a token that a does not have adds nothing, whatever b says."""
    absent = log_a == -torch.inf
    difference = (log_a - log_b).masked_fill(absent, 0.0)
    a = log_a.exp().clamp_min(torch.finfo(log_a.dtype).tiny)  # 0 times a difference of inf would be nan
    return (a * difference).sum(-1)


def _lacking(difference: Tensor) -> Tensor:
    """Rows with a token that a has and b has not, from log a - log b of `log_probabilities`, where it is finite."""
    return difference.amax(-1) > torch.finfo(difference.dtype).max / 2


def log_probabilities(logits: Float[Tensor, "N V"], temperature: float = 1.0) -> Float[Tensor, "N V"]:
    """Log-softmax in a tensor of its own; a token that is not there gets the lowest finite number, so 0 * it is 0."""
    scaled = logits if temperature == 1.0 else logits / temperature
    return log_softmax(scaled).clamp_(min=torch.finfo(logits.dtype).min)


def log_softmax(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """torch's, without a graph, and with a sum that is right to the last digits on a CPU too.

    There torch adds up a row's exponentials one after the other in fp32: 50,000 of them come out 3e-6 off in the mean,
    always to one side, and a gradient of all tokens with them. Its `sum` adds in pairs.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return torch.log_softmax(logits, dim=-1)
    shifted = logits - logits.amax(
        -1, keepdim=True
    )  # first: logits and their logsumexp round at the largest one's size
    return shifted.sub_(shifted.exp().sum(-1, keepdim=True).log_())


def divergence_and_gradient(
    log_q: Float[Tensor, "*N V"], log_p: Float[Tensor, "*N V"], kind: Kind, beta: float, with_gradient: bool
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N V"] | None]:
    """`divergence_rows` at temperature 1 in closed form: half the passes over memory that autograd makes.

    Args:
        log_q: the student's log-probabilities, all finite. OVERWRITTEN, as is log_p.
        log_p: the teacher's.

    Returns:
        The rows, and their gradient by the student's logits:
        forward q - p; reverse q (log q - log p - KL); jsd (1 - beta) q (log q - log m - KL(q || m)).
    """
    if kind == "forward":
        p = log_p.exp()
        rows = (p * log_p.sub_(log_q)).sum(-1).masked_fill_(_lacking(log_p), torch.inf)
        return rows, log_q.exp_().sub_(p) if with_gradient else None
    q = log_q.exp()
    if kind == "reverse":
        lacking = _lacking(log_q.sub_(log_p))
        terms = log_q.mul_(q)
        rows = terms.sum(-1)
        gradient = terms.sub_(q.mul_(rows.masked_fill(lacking, torch.nan)[..., None])) if with_gradient else None
        return rows.masked_fill_(lacking, torch.inf), gradient
    if kind != "jsd":
        raise ValueError(f"there is no formula for kind {kind!r}")
    if beta in (0.0, 1.0):
        nothing = 0.0 * log_p.exp_().add_(q).sum(-1)  # 0, or nan where there is one
        return nothing, q.mul_(nothing[..., None]) if with_gradient else None
    # From the log-ratio, which is small where the distributions are close. Beyond e^80 one of them weighs nothing.
    p, ratio = log_p.exp(), log_p.sub_(log_q).clamp_(-80.0, 80.0)
    q_to_m = ratio.exp().mul_(beta).add_(1.0 - beta).log_().neg_()
    to_student = (q * q_to_m).sum(-1)
    to_teacher = p.mul_(ratio.add_(q_to_m)).sum(-1)
    gradient = q_to_m.sub_(to_student[..., None]).mul_(q).mul_(1.0 - beta) if with_gradient else None
    return beta * to_teacher + (1.0 - beta) * to_student, gradient


def label_loss_and_gradient(
    log_q: Float[Tensor, "N V"], labels: Int[Tensor, " N"], with_gradient: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"] | None]:
    """Summed cross-entropy and its gradient q - onehot by the logits, which takes the place of `log_q`."""
    own = log_q.gather(1, labels[:, None])
    total = -own.masked_fill(own <= torch.finfo(own.dtype).min, -torch.inf).sum()
    if not with_gradient:
        return total, None
    return total, log_q.exp_().scatter_add_(1, labels[:, None], log_q.new_full((1, 1), -1.0).expand(len(labels), 1))


def distillation_loss(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"] | None,
    labels: Int[Tensor, " N"],
    with_gradient: bool,
    *,
    how: Divergence,
    has_labels: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "2"], Float[Tensor, "N V"] | None]:
    """ce_weight * CE + kl_weight * T² * divergence, summed over rows; (CE, T² * divergence); gradient by the student.

    CE is at temperature 1, and 0 where `has_labels` is False. The logits are left as they are.
    """
    assert teacher is not None
    log_q, log_p = (log_probabilities(logits, how.temperature) for logits in (student, teacher))
    ce, d_ce = log_q.new_zeros(()), None
    if has_labels:
        plain = log_q if how.temperature == 1.0 else log_softmax(student)
        wanted = with_gradient and how.ce_weight != 0
        ce, d_ce = label_loss_and_gradient(plain.clone() if wanted else plain, labels, wanted)
    rows, gradient = divergence_and_gradient(log_q, log_p, how.kind, how.beta, with_gradient)
    kl = how.temperature**2 * rows.sum()
    if gradient is not None:
        factor = how.kl_weight * how.temperature  # T² of the loss, 1/T of the chain rule
        gradient = gradient.mul_(factor) if factor != 1.0 else gradient
        if d_ce is not None:
            gradient.add_(d_ce, alpha=how.ce_weight)
    terms = ((how.ce_weight, ce), (how.kl_weight, kl))
    loss = sum((weight * term for weight, term in terms if weight), kl.new_zeros(()))  # 0 · inf would be nan
    return loss, torch.stack([ce, kl]), gradient


def _one_of(names: tuple[str, ...]) -> str:
    """'a', 'b' or 'c'."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"
