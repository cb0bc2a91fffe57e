"""One whole training step: models forward and backward, losses, optimizer; random weights.

Three ways of writing it: the kit's modules; the eager step as it is written by hand (all logits, then a divergence);
the reference formulation of the papers' code (every teacher runs on every sample, whole attention maps are kept).
"""

import gc
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measure import quantiles, sample_ms
from memory import peak_mib
from problem import relative_error
from providers import PROVIDERS
from settings import Settings, failures_as_rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_itk.batch import IGNORE_INDEX, Batch, Sample, count_targets, model_inputs, next_token_labels, pad
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.sft import SFTModule

Loss = Callable[[Batch], Tensor]
TAGS = ("", "expert")


class Size(NamedTuple):
    batch: int
    length: int
    vocab: int
    student: dict[str, int]
    teacher: dict[str, int]
    dtype: torch.dtype
    spread: float = 0.02  # deviation of the weights; large in the tiny models, whose gradients are compared


def _model(hidden: int, layers: int, heads: int, key_heads: int, head: int, feed: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "intermediate_size": feed,
    }


TINY = Size(4, 24, 300, _model(32, 4, 4, 2, 8, 48), _model(48, 4, 4, 2, 8, 64), torch.float32, 0.3)
CPU = Size(4, 128, 4096, _model(96, 4, 4, 2, 32, 256), _model(160, 6, 8, 2, 32, 384), torch.float32)
FULL = Size(  # 1.1 and 3.2 billion parameters
    4, 2048, 151936, _model(2048, 16, 16, 8, 128, 6144), _model(2560, 28, 32, 8, 128, 9728), torch.bfloat16
)


def build(size: Size, which: str, settings: Settings, attention: str = "sdpa") -> LlamaForCausalLM:
    """A model with random weights; the same ones every time."""
    torch.manual_seed({"student": 0, "teacher": 1, "expert": 2}[which])
    shape = size.student if which == "student" else size.teacher
    config = LlamaConfig(
        **shape,  # type: ignore[arg-type]
        vocab_size=size.vocab,
        max_position_embeddings=max(size.length, 128),
        initializer_range=size.spread,
        tie_word_embeddings=True,
        attn_implementation=attention,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(settings.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train() if which == "student" else model.eval().requires_grad_(False)


def make_batch(size: Size, domain: float, settings: Settings) -> Batch:
    """Samples of 60 to 100 % of the length, the second half of each is the response; a share belongs to the expert."""
    rng = np.random.default_rng(0)
    samples, experts = [], round(domain * size.batch)
    for i in range(size.batch):
        length = size.length if i == 0 else int(rng.integers(int(0.6 * size.length), size.length))
        ids = rng.integers(1, size.vocab, length)
        labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids)
        samples.append(Sample(ids, labels, i, int(i < experts)))
    batch: Any = pad(samples, pad_id=0, teachers=TAGS)
    return {k: v.to(settings.device) if isinstance(v, Tensor) else v for k, v in batch.items()}  # type: ignore[return-value]


# The kit's modules


def kit(module: InstructionModule) -> Loss:
    def loss(batch: Batch) -> Tensor:
        terms = module.losses(batch)
        return sum(term.weight * term.total for term in terms.values() if term.weight) / count_targets(batch)  # type: ignore[return-value]

    return loss


def kit_sft(models: Callable[..., Any]) -> Loss:
    return kit(SFTModule(models("student")))


def kit_kd(models: Callable[..., Any], layers: str | None = None) -> Loss:
    attention = AttentionLoss(layers=layers) if layers else None
    return kit(KDModule(models("student"), models("teacher"), attention=attention))


def kit_dae(models: Callable[..., Any]) -> Loss:
    return kit(DAEModule(models("student"), {"reference": models("teacher"), "expert": models("expert")}))


# The same as users and the papers' code write it


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(**model_inputs(batch)).logits


def _token_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of every position [B, S], in the logits' dtype."""
    student, teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def eager_sft(models: Callable[..., Any]) -> Loss:
    student = models("student")

    def loss(batch: Batch) -> Tensor:
        targets = next_token_labels(batch)
        return F.cross_entropy(
            _logits(student, batch).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX
        )

    return loss


def eager_kd(models: Callable[..., Any]) -> Loss:
    student, teacher = models("student"), models("teacher")

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            target = _logits(teacher, batch)
        keep = next_token_labels(batch) != IGNORE_INDEX
        return _token_kl(_logits(student, batch), target)[keep].mean()

    return loss


def reference_kd_attention(models: Callable[..., Any]) -> Loss:
    """Whole maps of every layer of both models, from `output_attentions`."""
    student, teacher = models("student", "eager"), models("teacher", "eager")
    layers, depth = student.config.num_hidden_layers, teacher.config.num_hidden_layers

    def loss(batch: Batch) -> Tensor:
        keep = next_token_labels(batch) != IGNORE_INDEX
        with torch.no_grad():
            answer = teacher(**model_inputs(batch), output_attentions=True)
        own = student(**model_inputs(batch), output_attentions=True)
        total = _token_kl(own.logits, answer.logits)[keep].mean()
        for layer, mine in enumerate(own.attentions):
            theirs = answer.attentions[round((layer + 1) * depth / layers) - 1]
            theirs = theirs.unflatten(1, (mine.shape[1], -1))  # consecutive teacher heads per student head
            floor = torch.finfo(mine.dtype).tiny
            log_ratio = theirs.clamp_min(floor).log() - mine.clamp_min(floor).log()[:, :, None]
            divergence = (theirs * log_ratio).sum(-1).mean(2).mean(1)  # mean over teacher heads, then student heads
            total = total + divergence[keep].mean() / layers
        return total

    return loss


def reference_dae(models: Callable[..., Any]) -> Loss:
    """Both teachers on every sample, then each sample takes one of the two losses."""
    student, teachers = models("student"), [models("teacher"), models("expert")]

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            targets = [_logits(teacher, batch) for teacher in teachers]
        own = _logits(student, batch)
        general, expert = (_token_kl(own, target) for target in targets)
        chosen = torch.where(batch["teacher_ids"] == 1, expert, general)
        return chosen[next_token_labels(batch) != IGNORE_INDEX].mean()

    return loss


def models_alone(models: Callable[..., Any], teacher: bool = True) -> Loss:
    """No loss at all: student forward and backward, the teacher forward once. What no loss code can undercut."""
    student = models("student").model
    frozen = models("teacher").model if teacher else None

    def loss(batch: Batch) -> Tensor:
        if frozen is not None:
            with torch.no_grad():
                frozen(**model_inputs(batch))
        return student(**model_inputs(batch)).last_hidden_state.float().mean()

    return loss


class Method(NamedTuple):
    name: str
    ways: dict[str, Callable[[Callable[..., Any]], Loss]]  # by the provider's key
    domain: float = 0.0
    teacher: bool = True


DAE = {"kit": kit_dae, "papers": reference_dae}
METHODS = [
    Method("kd", {"models": models_alone, "kit": kit_kd, "eager-step": eager_kd}),
    Method("kd + attention", {"kit": partial(kit_kd, layers="all"), "papers": reference_kd_attention}),
    Method("dae 50 %", DAE, 0.5),
    Method("kd + attention, every 4th layer", {"kit": partial(kit_kd, layers="every:4")}),
    Method(
        "sft", {"models": partial(models_alone, teacher=False), "kit": kit_sft, "eager-step": eager_sft}, teacher=False
    ),
    Method("dae 10 %", DAE, 0.1),
    Method("dae 90 %", DAE, 0.9),
]


@cache
def disagreement(number: int) -> float | None:
    """Relative difference between the student's gradients of the two ways of writing a method, on a tiny model."""
    settings, method = Settings(device="cpu", tiny=True), METHODS[number]
    gradients = []
    for way in (way for key, way in method.ways.items() if PROVIDERS[key].role == "rival"):
        made: dict[str, Any] = {}
        loss = way(lambda *args, made=made: made.setdefault(args[0], build(TINY, args[0], settings, *args[1:])))
        loss(make_batch(TINY, method.domain, settings)).backward()
        parameters = [p for p in made["student"].parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    return relative_error(gradients[0], gradients[1]) if len(gradients) > 1 else None


def run(settings: Settings) -> None:
    size = settings.pick(TINY, CPU, FULL)
    shape = {"batch": size.batch, "length": size.length, "vocab": size.vocab}
    shape |= {name: "x".join(map(str, getattr(size, name).values())) for name in ("student", "teacher")}
    alone: dict[bool, float] = {}
    for method in METHODS:
        base = {"subject": "training_step", "mode": "step", "dtype": str(size.dtype).removeprefix("torch.")}
        base["shape"] = {"method": method.name, **shape}
        if settings.over:
            settings.add(**base, provider="all", status="skipped", reason="time budget")
            continue
        # Methods that differ in the experts' share only are compared once.
        error = disagreement(next(i for i, first in enumerate(METHODS) if first.ways is method.ways))
        if error is not None and not error < 1e-3:
            reason = f"the ways of writing it disagree: gradients differ by {error:.1e}"
            settings.add(**base, provider="all", status="wrong", reason=reason, gradient_error=error)
            continue
        batch = make_batch(size, method.domain, settings)
        real = int((batch["sample_ids"] >= 0).sum())
        for key, way in method.ways.items():
            row = {**base, "provider": key}
            with failures_as_rows(settings, row):
                found = _time(way, size, batch, settings)
                if PROVIDERS[key].role == "yardstick":
                    alone[method.teacher] = found["ms"]
                elif method.teacher in alone:
                    found["share_beyond_models"] = 1 - alone[method.teacher] / found["ms"]
                tokens_per_second = 1e3 * real / found["ms"]
                settings.add(**row, status="ok", **found, tokens_per_s=tokens_per_second, gradient_error=error)
            gc.collect()
            if settings.device == "cuda":
                torch.cuda.empty_cache()


def _time(way: Callable[..., Loss], size: Size, batch: Batch, settings: Settings) -> dict[str, Any]:
    made: dict[str, Any] = {}
    loss = way(lambda *args: made.setdefault(args[0], build(size, args[0], settings, *args[1:])))
    parameters = list(made["student"].parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=settings.device == "cuda")  # lr 0: every sample is the same
    last: list[Tensor] = []

    def step() -> None:
        value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        last[:] = [value.detach()]

    found = quantiles(sample_ms(step, settings))
    return {**found, "memory_mib": peak_mib(step, settings.device), "loss": last[0].item()}
