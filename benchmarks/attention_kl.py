"""The attention loss: KL of two attention maps from queries and keys, gradients of the student's queries and keys."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import compiled, measure_all
from problem import Inputs, Loss, Make, Problem
from settings import Settings, Unavailable
from torch import Tensor

from lightning_itk.attention import attention_kl


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    group: int  # query heads per key head
    dim: int
    teacher_dim: int
    window: int | None = None
    documents: int = 1  # per row; more than 1 = packed
    share: float = 1.0  # of the rows that count
    compiled: bool = False


TINY = [
    Shape(1, 33, 4, 2, 16, 16),
    Shape(2, 20, 2, 1, 16, 32, window=5, share=0.5),
    Shape(1, 24, 2, 2, 16, 16, documents=3),
]
CPU = [
    Shape(1, 1024, 4, 2, 64, 64, compiled=True),
    Shape(1, 1024, 4, 2, 64, 64, share=0.25),
    Shape(1, 1024, 4, 2, 64, 64, documents=6),
    Shape(8, 128, 4, 2, 64, 64),
]
FULL = [  # 16k tokens each, as far as they go
    Shape(8, 2048, 32, 4, 128, 128, compiled=True),
    Shape(4, 4096, 32, 4, 128, 128),
    Shape(8, 2048, 32, 4, 128, 128, share=0.25),
    Shape(2, 8192, 32, 4, 128, 128, documents=8),
    Shape(8, 2048, 32, 4, 64, 128),
    Shape(2, 8192, 32, 4, 128, 128, window=1024),
    Shape(32, 512, 32, 4, 128, 128),
    Shape(1, 16384, 32, 8, 128, 128),
    Shape(8, 2048, 16, 1, 128, 128),
    Shape(8, 2048, 16, 8, 64, 64),
    Shape(4, 2048, 16, 2, 256, 256),
    Shape(1, 32768, 8, 4, 128, 128),
]


def problem(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    b, s, h, g, ds, dt = shape[:6]

    def make(seed: int, small: bool) -> Inputs:
        length = min(s, 321) if small else s
        batch = min(b, 2) if small else b
        generator = torch.Generator(device).manual_seed(seed)
        random = partial(torch.randn, generator=generator, device=device)
        rows = torch.rand(batch, length, generator=generator, device=device) < shape.share
        rows[:, -1] = True
        doc = torch.arange(length, device=device, dtype=torch.int32) * shape.documents // length
        doc = doc.expand(batch, length).contiguous()
        return {
            "q_student": random(batch, h, length, ds).to(dtype),
            "k_student": random(batch, h // g, length, ds).to(dtype),
            "q_teacher": random(batch, h, length, dt).to(dtype),
            "k_teacher": random(batch, h // g, length, dt).to(dtype),
            "row_mask": rows,
            "document": doc,
            "kept": int(rows.sum()),
        }

    def reference(inputs: Inputs, rows: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=inputs["q_student"].device)
        batch = inputs["q_student"].shape[0]
        for i in range(batch):  # a row of the batch at a time: the maps are held in fp64
            part = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            total = total + eager_value(part, shape.window, rows)
        return total

    small_doc = make(0, False)
    kept = small_doc["kept"]
    pairs = _visible_pairs(small_doc["document"], small_doc["row_mask"], shape.window) * h
    heads = b * s * (h + h // g)
    read, written = dtype.itemsize * heads * (ds + dt), dtype.itemsize * heads * ds
    return Problem(
        subject="attention_kl",
        shape={key: value for key, value in shape._asdict().items() if key != "compiled"} | {"kept": kept},
        dtype=dtype,
        make=make,
        leaves=("q_student", "k_student"),
        reference=reference,
        kept=kept,
        forward=(2 * pairs * (ds + dt), read),
        both=(2 * pairs * (ds + dt) + 4 * pairs * ds, read + written),
        row_axis=2,
        compiled=shape.compiled,
        yardstick=_flash_step,
    )


def _visible_pairs(document: Tensor, rows: Tensor, window: int | None) -> int:
    """Pairs of a counting query row and a key that it sees, over all batch rows, for one head."""
    position = torch.arange(document.shape[1], device=document.device)
    start = torch.searchsorted(document[0].contiguous(), document[0].contiguous())
    seen = position - start + 1
    if window is not None:
        seen = seen.clamp_max(window)
    return int((rows * seen).sum())


def _flash_step(inputs: Inputs) -> Tensor:
    """The student's own causal attention, forward and backward, through torch's fused kernel."""
    q, k = (inputs[name].detach().requires_grad_() for name in ("q_student", "k_student"))
    v = inputs["k_student"].detach().clone().requires_grad_()
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(output, (q, k, v), output.detach())[0]


def _visible(inputs: Inputs, window: int | None, rows: Tensor) -> Tensor:
    document = inputs["document"]
    position = torch.arange(document.shape[1], device=document.device)
    distance = position[rows][:, None] - position[None, :]
    seen = (distance >= 0) & (distance < (window or document.shape[1]))
    return seen & (document[:, rows, None] == document[:, None, :])


def eager_value(
    inputs: Inputs, window: int | None, rows: Tensor | None = None, map_dtype: torch.dtype | None = None
) -> Tensor:
    """Both maps in full, as an eager attention makes them.

    Args:
        rows: query rows to take; None = all.
        map_dtype: the dtype of the maps; Hugging Face's eager attention returns them in the model's. None = fp32, or
            fp64 for fp64 inputs.
    """
    q_s, k_s, q_t, k_t = (inputs[name] for name in ("q_student", "k_student", "q_teacher", "k_teacher"))
    if rows is None:
        rows = torch.arange(q_s.shape[2], device=q_s.device)
    hidden = ~_visible(inputs, window, rows)[:, None]
    wide = torch.float64 if q_s.dtype == torch.float64 else torch.float32

    def scores(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).to(wide).masked_fill(hidden, -torch.inf)

    if map_dtype is None:
        log_s, log_t = (torch.log_softmax(scores(q, k), -1) for q, k in ((q_s, k_s), (q_t, k_t)))
        difference = (log_t - log_s).masked_fill(hidden, 0)
        divergence = (log_t.exp() * difference).sum(-1)
    else:  # all that is left of the scores are probabilities, so the logarithm needs a floor
        p_s, p_t = (torch.softmax(scores(q, k), -1).to(map_dtype).to(wide) for q, k in ((q_s, k_s), (q_t, k_t)))
        divergence = (p_t * (p_t.clamp_min(1e-9).log() - p_s.clamp_min(1e-9).log())).sum(-1)
    return (divergence.mean(1) * inputs["row_mask"][:, rows]).sum()


def models(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x["q_student"], x["k_student"], x["q_teacher"], x["k_teacher"]


def ours(problem: Problem, impl: str) -> Loss:
    packed, window = problem.shape["documents"] > 1, problem.shape["window"]

    def loss(x: Inputs) -> Tensor:
        if packed and "cu_seqlens" not in x:  # made once per batch, not per layer
            document = x["document"]
            starts = F.pad(document.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
            x["cu_seqlens"] = F.pad(starts, (0, 1), value=document.numel()).to(torch.int32)
        return attention_kl(
            *models(x),
            window=window,
            cu_seqlens=x.get("cu_seqlens"),
            row_mask=x["row_mask"],
            impl=impl,  # type: ignore[arg-type]
        )

    return loss


def eager_maps(problem: Problem, map_dtype: torch.dtype | None = None) -> Loss:
    return lambda x: eager_value(x, problem.shape["window"], map_dtype=map_dtype)


def compiled_maps(problem: Problem, settings: Settings) -> Loss:
    window = problem.shape["window"]
    run: Callable[..., Tensor] = compiled(lambda x: eager_value(x, window), settings)
    names = ("q_student", "k_student", "q_teacher", "k_teacher", "row_mask", "document")
    return lambda x: run({name: x[name] for name in names})


class _Composed(torch.autograd.Function):
    """The KL and its gradient from fused attention calls alone: P_t k_t and P_t k_s are attention outputs with the keys
    as values, and the gradients of the values give dk (see the report's method section)."""

    @staticmethod
    def forward(ctx, q_s, k_s, q_t, k_t, weight):  # type: ignore[no-untyped-def]
        c_s, c_t = q_s.shape[-1] ** -0.5, q_t.shape[-1] ** -0.5
        attend = partial(F.scaled_dot_product_attention, is_causal=True)
        lse_s, lse_t = _log_sum_exp(q_s, k_s), _log_sum_exp(q_t, k_t)
        teacher_on_student = attend(q_t, k_t, k_s)
        own = (q_t.float() * attend(q_t, k_t, k_t).float()).sum(-1)
        cross = (q_s.float() * teacher_on_student.float()).sum(-1)
        kl = c_t * own - lse_t - c_s * cross + lse_s
        ctx.save_for_backward(q_s, k_s, q_t, k_t, weight, teacher_on_student)
        return (kl.mean(1) * weight).sum()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        q_s, k_s, q_t, k_t, weight, teacher_on_student = ctx.saved_tensors
        row = (upstream * weight / q_s.shape[1])[:, None, :, None]
        scale = q_s.shape[-1] ** -0.5
        attend = partial(F.scaled_dot_product_attention, is_causal=True)
        with torch.enable_grad():
            values = torch.zeros_like(k_s).requires_grad_()
            student, teacher = attend(q_s, k_s, values), attend(q_t, k_t, values)
        d_out = (row * q_s).to(q_s.dtype)
        dk = scale * (torch.autograd.grad(student, values, d_out)[0] - torch.autograd.grad(teacher, values, d_out)[0])
        dq = scale * row * (attend(q_s, k_s, k_s) - teacher_on_student)
        return dq.to(q_s.dtype), dk, None, None, None


def _log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True)[1].float()
    if q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, k, 0.0, True)[1][:, :, : q.shape[2]]
    return aten._scaled_dot_product_efficient_attention(q, k, k, None, True, 0.0, True)[1][:, :, : q.shape[2]]


def composed(problem: Problem) -> Loss:
    shape = problem.shape
    if shape["window"] or shape["documents"] > 1 or shape["dim"] != shape["teacher_dim"]:
        raise Unavailable("the composed form is written for plain causal maps of equal head dimensions")

    def loss(x: Inputs) -> Tensor:
        q_s, k_s, q_t, k_t = models(x)
        group = q_s.shape[1] // k_s.shape[1]
        k_s, k_t = k_s.repeat_interleave(group, 1), k_t.repeat_interleave(group, 1)
        return _Composed.apply(q_s, k_s, q_t, k_t, x["row_mask"].float())

    return loss


def plain_kernel(problem: Problem) -> Loss:
    from attention_plain import INTERPRET, plain_attention_kl

    if not torch.cuda.is_available() and not INTERPRET:
        raise Unavailable("the plain Triton kernel needs a GPU")
    window = problem.shape["window"]
    return lambda x: plain_attention_kl(*models(x), x["document"], x["row_mask"], window)


def providers(settings: Settings) -> dict[str, Make]:
    return {
        "triton": partial(ours, impl="triton"),
        "torch": partial(ours, impl="torch"),
        "plain": plain_kernel,
        "eager-maps": eager_maps,
        "composed": composed,
        "compile": partial(compiled_maps, settings=settings),
    }


def run(settings: Settings) -> None:
    measure_all(problem, settings.pick(TINY, CPU, FULL), providers(settings), settings)
