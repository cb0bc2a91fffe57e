"""Distillation from hidden states and heads: the KL of two vocabulary distributions, gradients of states and head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import compiled, measure_all
from problem import Inputs, Loss, Make, Problem
from settings import Settings, Unavailable
from torch import Tensor

from lightning_itk.losses import linear_kl_divergence
from lightning_itk.losses.divergence import divergence_rows


class Shape(NamedTuple):
    tokens: int
    hidden: int
    teacher_hidden: int
    vocab: int
    share: float = 1.0  # of the tokens that are response tokens
    kind: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    compiled: bool = False


TINY = [Shape(48, 16, 24, 300, 0.5), Shape(33, 16, 24, 300, kind="jsd", temperature=2.0)]
CPU = [
    Shape(256, 128, 192, 32000, compiled=True),
    Shape(256, 128, 192, 32000, 0.25),
    Shape(256, 128, 192, 32000, kind="jsd"),
]
FULL = [  # most telling first: the run stops where its time is over
    Shape(8192, 2048, 4096, 128256, compiled=True),
    Shape(8192, 2048, 4096, 128256, 0.25),
    Shape(1024, 4096, 8192, 128256),
    Shape(8192, 2048, 4096, 128256, kind="jsd"),
    Shape(32768, 2048, 4096, 128256),
    Shape(8192, 2048, 4096, 128256, 0.5),
    Shape(8192, 1024, 2048, 32000),
    Shape(8192, 1024, 4096, 151936),
    Shape(4096, 8192, 8192, 128256),
    Shape(8192, 2048, 4096, 262144),
    Shape(8192, 2048, 4096, 128256, kind="reverse", temperature=2.0),
]


def targets(rows: int, vocab: int, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which about this share counts, the first one always."""
    labels = torch.randint(vocab, (rows,), generator=generator, device=generator.device)
    labels[torch.rand(rows, generator=generator, device=generator.device) >= share] = -100
    labels[0] = 0
    return labels


def problem(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    n, hs, ht, v = shape[:4]

    def make(seed: int, small: bool) -> Inputs:
        rows = min(n, 257) if small else n
        generator = torch.Generator(device).manual_seed(seed)
        random = partial(torch.randn, generator=generator, device=device)
        labels = targets(rows, v, shape.share, generator)
        return {
            "student_hidden": random(rows, hs).to(dtype),
            "student_head": (random(v, hs) * hs**-0.5).to(dtype),  # logits of deviation 1: KL about 1
            "teacher_hidden": random(rows, ht).to(dtype),
            "teacher_head": (random(v, ht) * ht**-0.5).to(dtype),
            "labels": labels,
            "kept": int((labels != -100).sum()),
        }

    def reference(inputs: Inputs, rows: Tensor | None) -> Tensor:
        labels = inputs["labels"] if rows is None else inputs["labels"][rows]
        keep = (labels != -100).nonzero().flatten()
        keep = keep if rows is None else rows[keep]
        student = inputs["student_hidden"][keep] @ inputs["student_head"].T
        teacher = inputs["teacher_hidden"][keep] @ inputs["teacher_head"].T
        return divergence_rows(student, teacher, shape.kind, shape.beta, shape.temperature).sum()  # type: ignore[arg-type]

    kept = make(0, False)["kept"]
    projections = 2 * kept * v * (hs + ht)
    read = dtype.itemsize * (v * (hs + ht) + kept * (hs + ht))
    written = dtype.itemsize * (v * hs + kept * hs)
    return Problem(
        subject="linear_kl",
        shape={key: value for key, value in shape._asdict().items() if key != "compiled"} | {"kept": kept},
        dtype=dtype,
        make=make,
        leaves=("student_hidden", "student_head"),
        reference=reference,
        kept=kept,
        forward=(projections, read),
        both=(projections + 4 * kept * v * hs, read + written),
        compiled=shape.compiled,
    )


def options(problem: Problem) -> dict[str, Any]:
    return {name: problem.shape[name] for name in ("kind", "beta", "temperature")}


def models(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x["student_hidden"], x["student_head"], x["teacher_hidden"], x["teacher_head"]


def ours(problem: Problem, impl: str) -> Loss:
    return lambda x: linear_kl_divergence(*models(x), x["labels"], impl=impl, **options(problem))  # type: ignore[arg-type]


def eager_rows(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float) -> Tensor:
    """The divergence as people write it, with F.kl_div on log-softmaxes."""
    student, teacher = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    divergence = partial(F.kl_div, reduction="sum", log_target=True)
    if kind == "forward":
        value = divergence(student, teacher)
    elif kind == "reverse":
        value = divergence(teacher, student)
    else:
        share = torch.tensor([1 - beta, beta], device=student.device, dtype=student.dtype).log()
        mixture = torch.logsumexp(torch.stack([student + share[0], teacher + share[1]]), 0)
        value = beta * divergence(mixture, teacher) + (1 - beta) * divergence(mixture, student)
    return temperature**2 * value


def eager_loss(problem: Problem, settings: Settings | None = None) -> Loss:
    """All logits of the rows that count, in the models' dtype; softmax in fp32. Compiled where settings are given."""

    def rows(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, keep: Tensor) -> Tensor:
        student = F.linear(hidden[keep], head).float()
        with torch.no_grad():
            teacher = F.linear(teacher_hidden[keep], teacher_head).float()
        return eager_rows(student, teacher, **options(problem))

    run = rows if settings is None else compiled(rows, settings)

    def loss(x: Inputs) -> Tensor:
        keep = (x["labels"] != -100).nonzero().flatten()
        return run(*models(x), keep)

    return loss


def eager_all(problem: Problem) -> Loss:
    """Logits of every row, as models return them; those that do not count are left out afterwards."""
    if problem.shape["share"] == 1:
        raise Unavailable("no row is ignored here")

    def loss(x: Inputs) -> Tensor:
        keep = (x["labels"] != -100).nonzero().flatten()
        student = F.linear(x["student_hidden"], x["student_head"])[keep].float()
        with torch.no_grad():
            teacher = F.linear(x["teacher_hidden"], x["teacher_head"])[keep].float()
        return eager_rows(student, teacher, **options(problem))

    return loss


def trl_chunked(problem: Problem) -> Loss:
    """What TRL's DistillationTrainer computes from hidden states: Triton on a GPU, torch operators on a CPU."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    temperature = problem.shape["temperature"]

    def loss(x: Inputs) -> Tensor:
        value, _, _ = _chunked_divergence_loss(
            x["student_hidden"][None],
            x["teacher_hidden"][None],
            x["student_head"],
            x["teacher_head"],
            (x["labels"] != -100)[None],
            beta=_beta(problem),
            num_items_in_batch=1,
            temperature=temperature,
        )
        return value * temperature**2

    return loss


def _beta(problem: Problem) -> float:
    """How Liger and TRL say the kind."""
    return {"forward": 0.0, "reverse": 1.0, "jsd": problem.shape["beta"]}[problem.shape["kind"]]


def _liger_sum(problem: Problem, module: Callable[..., Tensor]) -> Loss:
    """Of Liger's mean without T²."""
    factor = problem.shape["temperature"] ** 2
    return lambda x: module(*models(x), x["labels"]) * (x["kept"] * factor)


def liger_fused(problem: Problem) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=_beta(problem), temperature=problem.shape["temperature"])
    return _liger_sum(problem, module)


def liger_chunked(problem: Problem, settings: Settings) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=_beta(problem),
        temperature=problem.shape["temperature"],
        compiled=settings.device == "cuda" and not settings.tiny,
    )

    return _liger_sum(problem, module)


def orda(problem: Problem) -> Loss:
    from orda_kernel import SeparateTeacher, distillation_loss

    kind = problem.shape["kind"]
    if kind == "jsd":
        raise Unavailable("orda-kernel has no Jensen-Shannon with this definition")

    def loss(x: Inputs) -> Tensor:
        return distillation_loss(
            x["student_hidden"],
            x["student_head"],
            x["labels"],
            SeparateTeacher(hidden=x["teacher_hidden"], weight=x["teacher_head"]),
            student_ce_weight=0.0,
            kl_weight=1.0,
            kl_temperature=problem.shape["temperature"],
            kl_divergence=kind,
            reduction="sum",
            backend="auto" if torch.cuda.is_available() else "torch",
        ).loss

    return loss


def providers(settings: Settings) -> dict[str, Make]:
    return {
        "triton": partial(ours, impl="triton"),
        "torch": partial(ours, impl="torch"),
        "eager": eager_loss,
        "eager-all": eager_all,
        "trl-kl": trl_chunked,
        "liger-jsd": liger_fused,
        "orda": orda,
        "compile": partial(eager_loss, settings=settings),
        "chunked": partial(liger_chunked, settings=settings),
    }


def run(settings: Settings) -> None:
    measure_all(problem, settings.pick(TINY, CPU, FULL), providers(settings), settings)
