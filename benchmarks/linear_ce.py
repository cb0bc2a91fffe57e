"""Cross-entropy from hidden states and a head: what supervised fine-tuning pays."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from linear_kl import targets
from measure import compiled, measure_all
from problem import Inputs, Loss, Make, Problem
from settings import Settings, Unavailable
from torch import Tensor

from lightning_itk.losses import linear_cross_entropy


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocab: int
    share: float = 1.0
    compiled: bool = False


TINY = [Shape(48, 16, 300, 0.5)]
CPU = [Shape(256, 128, 32000, compiled=True), Shape(256, 128, 32000, 0.25)]
FULL = [
    Shape(8192, 2048, 128256, compiled=True),
    Shape(8192, 2048, 128256, 0.25),
    Shape(1024, 4096, 128256),
    Shape(32768, 2048, 128256),
    Shape(8192, 1024, 32000),
    Shape(8192, 4096, 151936),
    Shape(4096, 8192, 262144),
]


def problem(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    n, h, v = shape[:3]

    def make(seed: int, small: bool) -> Inputs:
        rows = min(n, 257) if small else n
        generator = torch.Generator(device).manual_seed(seed)
        random = partial(torch.randn, generator=generator, device=device)
        labels = targets(rows, v, shape.share, generator)
        head = (random(v, h) * h**-0.5).to(dtype)
        return {"hidden": random(rows, h).to(dtype), "head": head, "labels": labels, "kept": int((labels >= 0).sum())}

    def reference(inputs: Inputs, rows: Tensor | None) -> Tensor:
        hidden, labels = inputs["hidden"], inputs["labels"]
        if rows is not None:
            hidden, labels = hidden[rows], labels[rows]
        return F.cross_entropy(hidden @ inputs["head"].T, labels, reduction="sum")

    kept = make(0, False)["kept"]
    read, written = dtype.itemsize * (v * h + kept * h), dtype.itemsize * (v * h + kept * h)
    return Problem(
        subject="linear_ce",
        shape={"tokens": n, "hidden": h, "vocab": v, "share": shape.share, "kept": kept},
        dtype=dtype,
        make=make,
        leaves=("hidden", "head"),
        reference=reference,
        kept=kept,
        forward=(2 * kept * v * h, read),
        both=(6 * kept * v * h, read + written),
        compiled=shape.compiled,
    )


def ours(problem: Problem, impl: str) -> Loss:
    return lambda x: linear_cross_entropy(x["hidden"], x["head"], x["labels"], impl=impl)  # type: ignore[arg-type]


def whole(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """All logits in the model's dtype, as a model returns them; softmax in fp32."""
    return F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="sum")


def eager_loss(problem: Problem, settings: Settings | None = None) -> Loss:
    """Of the rows that count only. Compiled where settings are given."""
    run = whole if settings is None else compiled(whole, settings)

    def loss(x: Inputs) -> Tensor:
        keep = (x["labels"] != -100).nonzero().flatten()
        return run(x["hidden"][keep], x["head"], x["labels"][keep])

    return loss


def eager_all(problem: Problem) -> Loss:
    if problem.shape["share"] == 1:
        raise Unavailable("no row is ignored here")
    return lambda x: whole(x["hidden"], x["head"], x["labels"])


def trl_chunked(problem: Problem) -> Loss:
    """What TRL's SFTTrainer computes from hidden states, its metrics with it: Triton on a GPU, torch on a CPU."""
    from trl.kernels import ChunkedLogProbFunction

    def loss(x: Inputs) -> Tensor:
        hidden, labels, keep = x["hidden"], x["labels"], x["labels"] != -100
        compact = hidden.is_cuda  # where Triton is, TRL leaves ignored rows out before the product
        hidden, labels = (hidden[keep], labels[keep]) if compact else (hidden, labels.clamp(min=0))
        found = ChunkedLogProbFunction.apply(
            hidden, x["head"], None, labels, 1.0, 32768, None, 1.0, ("log_probs", "entropy", "is_top1")
        )
        return -(found[0] if compact else found[0].masked_fill(~keep, 0)).sum()

    return loss


def torch_linear(problem: Problem) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    chosen = {"options": options()} if options is not None else {}  # with options it goes through the rows in chunks
    return lambda x: function(x["hidden"], x["head"], x["labels"], reduction="sum", **chosen)


def liger(problem: Problem) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda x: module(x["head"], x["hidden"], x["labels"])


def providers(settings: Settings) -> dict[str, Make]:
    return {
        "triton": partial(ours, impl="triton"),
        "torch": partial(ours, impl="torch"),
        "eager": eager_loss,
        "eager-all": eager_all,
        "trl-ce": trl_chunked,
        "torch-ce": torch_linear,
        "liger-ce": liger,
        "compile": partial(eager_loss, settings=settings),
    }


def run(settings: Settings) -> None:
    measure_all(problem, settings.pick(TINY, CPU, FULL), providers(settings), settings)
