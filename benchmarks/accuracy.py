"""What rounding does to the gradient while the student closes in on its teacher: no times, only errors against fp64.

The gradient of a divergence is the difference of two distributions. The closer they are, the more of it is lost where
logits, scores or maps are rounded to bf16 before the difference is taken. Inputs are bf16 for everybody.
"""

import dataclasses
from functools import partial

import attention_kl
import linear_kl
import torch
from measure import made
from problem import Inputs, Loss, Makers, Problem, Truth, check
from settings import Settings, failures_as_rows
from torch import Tensor

CLOSENESS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)


def nearby(x: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    """x plus noise of this deviation, rounded to x's dtype at random: small noise survives on average."""
    exponent = torch.frexp(x.float()).exponent
    ulp = torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent - 8)  # bf16 has 8 significant bits
    noise = distance * torch.randn(x.shape, generator=generator, device=x.device)
    dither = (torch.rand(x.shape, generator=generator, device=x.device) - 0.5) * ulp
    return (x.float() + noise + dither).to(x.dtype)


def close_heads(distance: float, settings: Settings) -> Problem:
    """Student and teacher share the head; logits of deviation 12, as trained models have."""
    rows, hidden, vocab = (16, 32, 500) if settings.tiny else (64, 256, 32000)
    if settings.device == "cuda":
        rows, hidden, vocab = 256, 2048, 128256
    base = linear_kl.problem(linear_kl.Shape(rows, hidden, hidden, vocab), torch.bfloat16, settings.device)

    def make(seed: int, small: bool) -> Inputs:
        inputs = base.make(seed, small)
        head = (12 * inputs["student_head"].float()).to(torch.bfloat16)
        generator = torch.Generator(settings.device).manual_seed(seed)
        teacher = nearby(inputs["student_hidden"], distance, generator)
        return inputs | {"student_head": head, "teacher_head": head.clone(), "teacher_hidden": teacher}

    shape = {**base.shape, "distance": distance, "logit_deviation": 12}
    return dataclasses.replace(base, subject="accuracy linear_kl", shape=shape, make=make)


def close_maps(distance: float, settings: Settings) -> Problem:
    """Student and teacher share the keys; scores of deviation 4."""
    size = attention_kl.Shape(1, 33 if settings.tiny else 256, 4, 2, 64, 64)
    base = attention_kl.problem(size, torch.bfloat16, settings.device)

    def make(seed: int, small: bool) -> Inputs:
        inputs = base.make(seed, small)
        queries = (4 * inputs["q_student"].float()).to(torch.bfloat16)
        generator = torch.Generator(settings.device).manual_seed(seed)
        teacher = nearby(queries, 4 * distance, generator)
        return inputs | {"q_student": queries, "q_teacher": teacher, "k_teacher": inputs["k_student"].clone()}

    shape = {**base.shape, "distance": distance, "score_deviation": 4}
    return dataclasses.replace(base, subject="accuracy attention_kl", shape=shape, make=make)


def trl_gkd(problem: Problem) -> Loss:
    """TRL's distillation loss on logits in the models' dtype, as its trainer calls it without autocast."""
    from trl.experimental.gkd import GKDTrainer

    def loss(x: Inputs) -> Tensor:
        student = x["student_hidden"] @ x["student_head"].T
        with torch.no_grad():
            teacher = x["teacher_hidden"] @ x["teacher_head"].T
        return GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], labels=x["labels"][None], beta=0.0, reduction="sum"
        )

    return loss


def head_providers(settings: Settings) -> Makers:
    plain = dataclasses.replace(settings, tiny=True)  # no compiler: it rounds as eager does
    known = linear_kl.providers(plain)
    del known["compile"], known["eager-all"]
    eager = known.pop("eager")
    return {**known, "bf16-logits": eager, "trl-gkd": trl_gkd}


def map_providers(settings: Settings) -> Makers:
    known = attention_kl.providers(settings)
    del known["compile"]
    eager = known.pop("eager-maps")
    bf16_maps = partial(attention_kl.eager_maps, map_dtype=torch.bfloat16)
    return {**known, "bf16-scores": eager, "bf16-maps": bf16_maps}


def run(settings: Settings) -> None:
    closeness = CLOSENESS[1:4:2] if settings.tiny else CLOSENESS
    for closer, makers in ((close_heads, head_providers(settings)), (close_maps, map_providers(settings))):
        for distance in closeness:
            if settings.over:
                row = {"subject": "accuracy", "provider": "all", "shape": {"distance": distance}}
                settings.add(**row, status="skipped", reason="time budget")
                continue
            problem = closer(distance, settings)
            truth = Truth.of(problem)
            for key, make in makers.items():
                row = {"subject": problem.subject, "provider": key, "shape": problem.shape, "dtype": "bfloat16"}
                with failures_as_rows(settings, row):
                    settings.add(**row, status="ok", **check(made(key, make, problem), problem, truth))
