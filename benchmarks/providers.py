"""Who takes part: one record each. Code knows a provider by its key; rows, tables and pictures say its shown name.

A subject says how a provider is made there (`{key: make}`); all else that sets one apart from another is a field here.
DistillKit is not among them: it is on no package index, and what is not its own code shall not bear its name.
"""

from dataclasses import dataclass
from typing import Literal

RED, PINK, BLUE, GREY, DARK, PALE = "#c1272d", "#e8838a", "#4c78a8", "#8a8a8a", "#5c5c5c", "#d8d8d8"
TEAL, LIME = "#00798c", "#a2c523"


@dataclass(frozen=True)
class Provider:
    """One way to do what a subject measures."""

    key: str
    shown: str  # its name in rows, by which result files are read again
    shown_on_cpu: str | None = None  # where it takes another form there
    formerly: str | None = None  # its name in older result files
    ours: bool = False
    role: Literal["rival", "yardstick", "nobody"] = "rival"  # yardstick: times are set against it; nobody: "*" and such
    package: str | None = None  # the distribution it comes with, which may be missing
    gpu: str | None = None  # what to say where there is none, if it needs one
    compiles: tuple[str, ...] = ()  # devices on which it compiles for every new shape, for minutes
    fused: bool = False  # works inside one operator, whose memory nobody can count on a CPU
    colour: str | None = None  # in pictures; None = the next free one

    def name(self, device: str) -> str:
        return self.shown_on_cpu if device == "cpu" and self.shown_on_cpu else self.shown


LIGER, LIGER_GPU = "liger-kernel", "Liger's Triton kernels need a GPU"
RECORDS = (
    # losses
    Provider("triton", "lightning_itk triton", ours=True, gpu="the Triton kernels need a GPU", colour=RED),
    Provider("torch", "lightning_itk torch", ours=True, colour=PINK),
    Provider("eager", "eager", colour=GREY),  # ignored rows are dropped before the product
    Provider("eager-all", "eager, ignored rows multiplied too", colour=DARK),
    Provider("eager-maps", "eager maps", colour=GREY),
    Provider("compile", "torch.compile", compiles=("cpu", "cuda"), fused=True, colour=BLUE),
    Provider("torch-ce", "torch linear_cross_entropy", fused=True),
    Provider("liger-jsd", "liger fused linear JSD", package=LIGER, gpu=LIGER_GPU),
    Provider("liger-ce", "liger fused linear CE", package=LIGER, gpu=LIGER_GPU),
    Provider("liger-kl", "liger KL / JSD", package=LIGER, gpu=LIGER_GPU),
    Provider("chunked", "liger chunked JSD", "liger chunked JSD (not compiled)", package=LIGER, compiles=("cuda",)),
    Provider("orda", "orda-kernel", "orda-kernel (its torch form)", package="orda-kernel"),
    Provider("trl-kl", "TRL chunked divergence", "TRL chunked divergence (its torch form)", package="trl", colour=TEAL),
    Provider("trl-ce", "TRL chunked log-prob", "TRL chunked log-prob (its torch form)", package="trl", colour=TEAL),
    Provider("plain", "plain kernel (atomics)"),  # runs in Triton's interpreter too, so it asks for a GPU itself
    Provider("composed", "composed of SDPA"),
    Provider("bf16-logits", "bf16 logits, fp32 softmax", colour=GREY),
    Provider("bf16-scores", "bf16 scores, fp32 maps", colour=GREY),
    Provider("bf16-maps", "bf16 maps, as eager attention returns them"),
    Provider("trl-gkd", "TRL GKD loss (bf16 throughout)", package="trl"),
    # training steps, and the kit where there is one of it
    Provider("kit", "lightning_itk", ours=True, colour=RED),
    Provider("eager-step", "eager, all logits", formerly="eager, TRL-style", colour=GREY),
    Provider("papers", "reference formulation", colour=BLUE),
    Provider("models", "models alone", role="yardstick", colour=PALE),
    # the loops around a step
    Provider("lightning", "lightning_itk in Lightning's Trainer", ours=True, colour=RED),
    Provider("hf-trainer", "Hugging Face Trainer", package="accelerate", colour=LIME),
    Provider("trl-sft", "TRL SFTTrainer", package="trl", colour=TEAL),
    Provider("trl-kd", "TRL DistillationTrainer, responses given", package="trl", colour=TEAL),
    # the data path
    Provider("tokenizer", "bare tokenizer on finished texts"),
    Provider("template", "apply_chat_template, record by record"),
    Provider("kit-process", "lightning_itk, one process", ours=True),
    Provider("kit-processes", "lightning_itk, all cores (wall time)", ours=True),
    Provider("kit-best-fit", "lightning_itk best fit", ours=True),
    Provider("trl-pack", "TRL bfd (moves the tokens too)", package="trl"),
    Provider("first-fit", "first fit"),
    Provider("in-order", "in order, no search"),
    Provider("kit-padded", "lightning_itk, padded", ours=True),
    Provider("kit-packed", "lightning_itk, packed", ours=True),
    Provider("loader", "DataLoader with transformers' collator, lists in memory"),
    Provider("loader-grouped", "the same with transformers' LengthGroupedSampler"),
    Provider("kit-clusters", "lightning_itk, 300 clusters", ours=True),
    Provider("argsort", "numpy argsort, no checks"),
    Provider("forward", "bare forward, no head"),
    Provider("eager-score", "eager: all logits, cross-entropy"),
    # no implementations
    Provider("all", "*", role="nobody"),
    Provider("reference", "reference", role="nobody"),
    Provider("yardstick", "yardstick", role="yardstick"),
)
PROVIDERS = {provider.key: provider for provider in RECORDS}


def named(shown: str) -> Provider:
    """Who a row of a result file is about; names that left the table read as rivals."""
    records = PROVIDERS.values()
    return next((p for p in records if shown in (p.shown, p.shown_on_cpu, p.formerly)), Provider(shown, shown))
