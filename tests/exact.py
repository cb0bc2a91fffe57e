"""What the exactness tests train: three methods on the same samples, cut into batches in any way, and a mixture."""

import functools

import torch
from tiny import ragged_samples, routed_model, tiny_model

from lightning_itk import batch as b
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule

METHODS = ["sft", "kd", "dae"]
TAGS = ("", "expert")
SAMPLES = ragged_samples(28, teachers=2)  # 3.5 global batches of 8: the last accumulation window is incomplete


def module(method: str, **kwargs):
    common = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
        "lr_scheduler": None,
        **kwargs,
    }
    if method == "moe":
        return SFTModule(routed_model(0), router_weight=0.1, **common)
    student = tiny_model("llama", 0)
    attention = AttentionLoss(weight=0.5)
    if method == "sft":
        return SFTModule(student, **common)
    teacher = functools.partial(tiny_model, "llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    if method == "kd":
        return KDModule(student, teacher(seed=1), ce_weight=0.3, temperature=2.0, attention=attention, **common)
    teachers = {"reference": teacher(seed=1), "expert": teacher(seed=2)}
    return DAEModule(student, teachers, teacher_weights={"expert": 2.0}, attention=attention, **common)


def batches(size: int, layout: str = "padded"):
    groups = [SAMPLES[i : i + size] for i in range(0, len(SAMPLES), size)]
    if layout == "packed":
        rows = [[group[: size // 2], group[size // 2 :]] for group in groups]
        return [b.pack([row for row in rs if row], pad_id=0, teachers=TAGS) for rs in rows]
    multiple = 32 if layout == "wide" else 1
    return [b.pad(group, pad_id=0, teachers=TAGS, multiple=multiple) for group in groups]
