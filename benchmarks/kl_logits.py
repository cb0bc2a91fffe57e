"""KL and Jensen-Shannon between logits that are already there."""

from functools import partial
from typing import NamedTuple

import torch
from linear_kl import eager_rows, options
from measure import compiled, measure_all
from problem import Inputs, Loss, Make, Problem
from settings import Settings
from torch import Tensor

from lightning_itk.losses import kl_divergence
from lightning_itk.losses.divergence import divergence_rows


class Shape(NamedTuple):
    tokens: int
    vocab: int
    kind: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    compiled: bool = False


TINY = [Shape(33, 300), Shape(20, 300, "jsd")]
CPU = [Shape(256, 32000, compiled=True), Shape(256, 32000, "jsd")]
FULL = [
    Shape(8192, 128256, compiled=True),
    Shape(8192, 128256, "jsd"),
    Shape(1024, 128256),
    Shape(8192, 32000),
    Shape(4096, 262144),
    Shape(8192, 128256, "reverse", temperature=2.0),
]


def problem(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    n, v = shape[:2]

    def make(seed: int, small: bool) -> Inputs:
        rows = min(n, 257) if small else n
        generator = torch.Generator(device).manual_seed(seed)
        student, teacher = (torch.randn(rows, v, generator=generator, device=device, dtype=dtype) for _ in range(2))
        return {"student": student, "teacher": teacher, "kept": rows}

    def reference(inputs: Inputs, rows: Tensor | None) -> Tensor:
        student, teacher = inputs["student"], inputs["teacher"]
        if rows is not None:
            student, teacher = student[rows], teacher[rows]
        return divergence_rows(student, teacher, shape.kind, shape.beta, shape.temperature).sum()  # type: ignore[arg-type]

    matrix = n * v * dtype.itemsize
    return Problem(
        subject="kl_logits",
        shape={key: value for key, value in shape._asdict().items() if key != "compiled"},
        dtype=dtype,
        make=make,
        leaves=("student",),
        reference=reference,
        kept=n,
        forward=(0, 2 * matrix),
        both=(0, 3 * matrix),
        compiled=shape.compiled,
    )


def ours(problem: Problem, impl: str) -> Loss:
    return lambda x: kl_divergence(x["student"], x["teacher"], impl=impl, **options(problem))  # type: ignore[arg-type]


def eager_loss(problem: Problem, settings: Settings | None = None) -> Loss:
    def whole(student: Tensor, teacher: Tensor) -> Tensor:
        return eager_rows(student.float(), teacher.float(), **options(problem))

    run = whole if settings is None else compiled(whole, settings)
    return lambda x: run(x["student"], x["teacher"])


def liger(problem: Problem) -> Loss:
    """Liger's losses take log-probabilities: the caller pays two log-softmaxes, as its users do."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    kind, temperature = problem.shape["kind"], problem.shape["temperature"]
    if kind == "forward":
        module = LigerKLDIVLoss(reduction="sum", log_target=True)
    else:
        module = LigerJSD(beta=1.0 if kind == "reverse" else problem.shape["beta"])

    def loss(x: Inputs) -> Tensor:
        factor = temperature**2 if kind == "forward" else temperature**2 * x["kept"]  # JSD returns a mean
        student = torch.log_softmax(x["student"].float() / temperature, -1)
        teacher = torch.log_softmax(x["teacher"].float() / temperature, -1)
        return module(student, teacher) * factor

    return loss


def providers(settings: Settings) -> dict[str, Make]:
    return {
        "triton": partial(ours, impl="triton"),
        "torch": partial(ours, impl="torch"),
        "eager": eager_loss,
        "liger-kl": liger,
        "compile": partial(eager_loss, settings=settings),
    }


def run(settings: Settings) -> None:
    measure_all(problem, settings.pick(TINY, CPU, FULL), providers(settings), settings)
