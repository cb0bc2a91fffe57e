"""The public losses against formulas in fp64 and autograd: any shape, stride, dtype, mask; refusals are one line."""

import math
from collections.abc import Callable
from typing import Any

import torch
from fuzz import comparison
from fuzz.attention import maps
from fuzz.comparison import Leaf, compare, dtypes, size
from fuzz.engine import one_line
from hypothesis import strategies as st
from torch import Tensor

from lightning_itk.losses import (
    Head,
    cross_entropy,
    kl_divergence,
    linear_cross_entropy,
    linear_divergence,
    linear_kl_divergence,
    linear_loss,
)
from lightning_itk.losses.chunked import linear_token_scores


def case(data: st.DataObject) -> str:
    """A loss with its gradients, or shapes that do not belong together."""
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="values"))
    subject = data.draw(st.sampled_from([logits, linear, own, maps, refusals]), label="subject")
    subject(data)
    return "refused" if subject is refusals else subject.__name__


def labels_of(draw: Any, rows: tuple[int, ...], vocab: int) -> Tensor:
    """int64 labels, some, all or none ignored; contiguous or a column of a table."""
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]), label="ignored")
    kind = draw(st.sampled_from([torch.int64, torch.int64, torch.int32]), label="labels")
    labels = torch.randint(0, vocab, rows, dtype=kind).masked_fill(torch.rand(rows) < ignored, -100)
    if draw(st.booleans(), label="column of labels"):
        return torch.stack([torch.full_like(labels, 7), labels], -1)[..., 1]
    return labels


def rows_divergence(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float) -> Tensor:
    """From probabilities, in the tensors' own precision."""
    log_q, log_p = (logits.div(temperature).log_softmax(-1) for logits in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward":
        rows = (p * (log_p - log_q)).sum(-1)
    elif kind == "reverse":
        rows = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    return temperature**2 * rows


def options_of(draw: Any) -> dict[str, Any]:
    return {
        "kind": draw(st.sampled_from(["forward", "reverse", "jsd"]), label="kind"),
        "beta": draw(st.sampled_from([0.5, 0.1, 0.9, 0.0, 1.0]), label="beta"),
        "temperature": draw(st.sampled_from([1.0, 2.0, 0.7]), label="temperature"),
    }


def logits(data: st.DataObject) -> None:
    """`kl_divergence` and `cross_entropy`."""
    draw, rows = data.draw, tuple(data.draw(st.lists(st.integers(0, 5), max_size=3), label="rows"))
    vocab, teacher_vocab = size(draw, "vocabulary", 1), size(draw, "teacher's vocabulary", 1)
    spread = draw(st.sampled_from([1.0, 0.01, 12.0]), label="spread")
    student = Leaf(draw, "student", (*rows, vocab), dtypes(draw, "student's dtype"), spread)
    scale = 1.0 + math.prod(rows) * max(1.0, spread)
    common = min(vocab, teacher_vocab)
    if draw(st.booleans(), label="cross-entropy"):
        labels = labels_of(draw, rows, vocab)
        keep = labels != -100
        compare(
            draw,
            [student],
            lambda: cross_entropy(student(), labels, impl=comparison.IMPL),
            lambda: -student(True).log_softmax(-1)[keep].gather(-1, labels[keep].long()[:, None]).sum(),
            scale,
        )
        return
    teacher, how = (
        Leaf(draw, "teacher", (*rows, teacher_vocab), dtypes(draw, "teacher's dtype"), spread),
        options_of(draw),
    )
    given = labels_of(draw, rows, common) if draw(st.booleans(), label="with labels") else None
    keep = torch.ones(rows, dtype=torch.bool) if given is None else given != -100

    def truth() -> Tensor:
        q, p = student(True)[..., :common][keep], teacher(True).detach()[..., :common][keep]
        return rows_divergence(q, p, **how).sum()

    def ours() -> Tensor:
        return kl_divergence(student(), teacher(), given, impl=comparison.IMPL, **how)

    compare(draw, [student], ours, truth, scale * how["temperature"] ** 2, [teacher])


def head_of(
    draw: Any, name: str, vocab: int, hidden: int, dtype: torch.dtype
) -> tuple[list[Leaf], Callable[..., Head]]:
    weight = Leaf(draw, f"{name} weight", (vocab, hidden), dtype)
    bias = Leaf(draw, f"{name} bias", (vocab,), dtype) if draw(st.booleans(), label=f"{name} bias") else None
    factor = draw(st.sampled_from([1.0, 1.0, 0.25]), label=f"{name} scale")
    cap = draw(st.sampled_from([None, None, 3.0]), label=f"{name} soft-cap")

    def make(wide: bool = False) -> Head:
        return Head(weight(wide), None if bias is None else bias(wide), factor, cap)

    return [weight] + ([bias] if bias else []), make


def projected(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)
    z = head.scale * z
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def linear(data: st.DataObject) -> None:
    """`linear_kl_divergence`, `linear_cross_entropy` and `linear_token_scores`."""
    draw = data.draw
    rows, vocab, width = size(draw, "rows"), size(draw, "vocabulary", 1), size(draw, "hidden size", 1)
    hidden = Leaf(draw, "student", (rows, width), dtypes(draw, "dtype"))
    head_leaves, head = head_of(draw, "student", vocab, width, dtypes(draw, "head's dtype"))
    scale = 1.0 + rows * math.sqrt(width)
    if draw(st.booleans(), label="cross-entropy"):
        labels = labels_of(draw, (rows,), vocab)
        keep = labels != -100

        def nll() -> Tensor:
            return (
                -projected(hidden(True)[keep], head(True))
                .log_softmax(-1)
                .gather(-1, labels[keep].long()[:, None])
                .sum()
            )

        leaves = [hidden, *head_leaves]
        compare(draw, leaves, lambda: linear_cross_entropy(hidden(), head(), labels, impl=comparison.IMPL), nll, scale)
        found = linear_token_scores(hidden(), head(), labels.long(), ranks=True)
        assert abs(found.nll.sum().item() - nll().item()) <= 3e-5 * (scale + abs(nll().item()))
        assert ((found.rank == 0) == ~keep).all()
        return
    teacher_vocab, teacher_width = size(draw, "teacher's vocabulary", 1), size(draw, "teacher's hidden size", 1)
    teacher = Leaf(draw, "teacher", (rows, teacher_width), dtypes(draw, "teacher's dtype"))
    beside, teacher_head = head_of(draw, "teacher", teacher_vocab, teacher_width, dtypes(draw, "its head's dtype"))
    common, how = min(vocab, teacher_vocab), options_of(draw)
    given = labels_of(draw, (rows,), common) if draw(st.booleans(), label="with labels") else None
    ce_weight = draw(st.sampled_from([0.0, 0.5]), label="ce_weight") if given is not None else 0.0
    weights = {"ce_weight": ce_weight, "kl_weight": draw(st.sampled_from([1.0, 0.3]), label="kl_weight")}
    kept = torch.ones(rows, dtype=torch.bool) if given is None else given != -100

    def truth() -> Tensor:
        student_logits = projected(hidden(True)[kept], head(True))[:, :common]
        teacher_logits = projected(teacher(True).detach()[kept], teacher_head(True))[:, :common].detach()
        loss = weights["kl_weight"] * rows_divergence(student_logits, teacher_logits, **how).sum()
        if ce_weight:
            loss = loss - ce_weight * student_logits.log_softmax(-1).gather(-1, given[kept].long()[:, None]).sum()
        return loss

    def ours() -> Tensor:
        return linear_kl_divergence(
            hidden(), head(), teacher(), teacher_head(), given, impl=comparison.IMPL, **how, **weights
        )

    scale *= 3 * max(1.0, math.sqrt(teacher_width))
    compare(draw, [hidden, *head_leaves], ours, truth, scale, [teacher, *beside])


def own(data: st.DataObject) -> None:
    """`linear_loss` and `linear_divergence` with a row loss of the user's."""
    draw = data.draw
    rows, vocab, width = size(draw, "rows"), size(draw, "vocabulary", 1), size(draw, "hidden size", 1)
    hidden, labels = Leaf(draw, "student", (rows, width), dtypes(draw, "dtype")), labels_of(draw, (rows,), vocab)
    head_leaves, head = head_of(draw, "student", vocab, width, dtypes(draw, "head's dtype"))
    kept, leaves, scale = labels != -100, [hidden, *head_leaves], 1.0 + rows * math.sqrt(width)

    def entropy(student: Tensor, *_: Tensor) -> Tensor:
        log_q = student.log_softmax(-1)
        return (log_q.exp() * log_q).sum(-1)

    def plain() -> Tensor:
        return entropy(projected(hidden(True)[kept], head(True))).sum()

    if draw(st.booleans(), label="with a teacher"):
        compare(
            draw, leaves, lambda: linear_divergence(entropy, hidden(), head(), hidden(), head(), labels), plain, scale
        )
    else:
        compare(draw, leaves, lambda: linear_loss(entropy, hidden(), head(), labels), plain, scale)


def refusals(data: st.DataObject) -> None:
    """Shapes that do not belong together."""
    draw = data.draw
    n, v, h = (draw(st.integers(1, 5), label=name) for name in ("rows", "vocabulary", "hidden size"))
    x, w, y = torch.randn(n, h), torch.randn(v, h), torch.zeros(n, dtype=torch.long)
    logits, far = torch.randn(n, v), torch.zeros(n + 1, dtype=torch.long)
    wrong: dict[str, Callable[[], Tensor]] = {
        "too few labels": lambda: cross_entropy(logits, y[:-1]),
        "labels of another shape": lambda: cross_entropy(logits, y[:, None]),
        "labels that are no numbers of tokens": lambda: cross_entropy(logits, y.float()),
        "no vocabulary": lambda: cross_entropy(torch.tensor(1.0), torch.tensor(0)),
        "other rows of the teacher": lambda: kl_divergence(logits, torch.randn(n + 1, v)),
        "too many labels for two": lambda: kl_divergence(logits, logits, far),
        "temperature": lambda: kl_divergence(logits, logits, temperature=draw(st.sampled_from([0, -1, math.nan]))),
        "beta": lambda: kl_divergence(logits, logits, kind="jsd", beta=draw(st.sampled_from([-1, 2, math.nan]))),
        "kind": lambda: kl_divergence(logits, logits, kind="sideways"),  # type: ignore[arg-type]
        "another hidden size": lambda: linear_cross_entropy(x, torch.randn(v, h + 1), y),
        "a head of one dimension": lambda: linear_cross_entropy(x, torch.randn(v), y),
        "hidden states of three": lambda: linear_cross_entropy(x[None], w, y),
        "too few labels of a head": lambda: linear_cross_entropy(x, w, y[:-1]),
        "other rows of the teacher's states": lambda: linear_kl_divergence(x, w, torch.randn(n + 1, h), w),
        "another hidden size of the teacher": lambda: linear_kl_divergence(x, w, x, torch.randn(v, h + 1)),
        "cross-entropy without labels": lambda: linear_kl_divergence(x, w, x, w, ce_weight=1.0),
        "too many labels of heads": lambda: linear_kl_divergence(x, w, x, w, far),
        "too few labels of an own loss": lambda: linear_loss(lambda z, _: z.sum(-1), x, w, y[:-1]),
        "other rows in an own loss": lambda: linear_divergence(
            lambda a, b, _: (a - b).sum(-1), x, w, torch.randn(n + 1, h), w, y
        ),
    }
    name = draw(st.sampled_from(sorted(wrong)), label="which")
    try:
        wrong[name]()
    except ValueError as error:
        one_line(error)
    else:
        raise AssertionError(f"{name}, yet accepted")
