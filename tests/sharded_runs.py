"""What test_sharded_loading.py runs on every rank."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import Halves
from tiny import QUIET, byte_tokenizer
from torch.distributed.tensor import DTensor

from lightning_itk.callbacks import HFExport
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.models.loading import LoRA, weights_hash


class Losses(L.Callback):
    """The loss of every micro-batch of this rank, and the sizes of the weights that it holds when training starts."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.sizes: list[int] = []

    def on_fit_start(self, trainer, pl_module):
        local = [p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters()]
        self.sizes = [t.untyped_storage().nbytes() for t in local]
        self.sharded = all(isinstance(p, DTensor) for p in pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["loss"].detach())


def module(method: str, student: str, teachers: tuple[str, ...], **options):
    common = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.3), "lr_scheduler": None, **options}
    if method == "lora":
        kept = ["embed_tokens"]
        return SFTModule(student, lora=LoRA(r=4, dropout=0.1, modules_to_save=kept), **common)
    if method == "sft":
        return SFTModule(student, **common)
    common["attention"] = AttentionLoss(weight=0.5)
    if method == "kd":
        return KDModule(student, teachers[0], ce_weight=0.3, **common)
    return DAEModule(student, dict(zip(("reference", "expert"), teachers, strict=True)), **common)


def train(method: str, student: str, teachers: tuple[str, ...], folder: Path, **options) -> None:
    """Two epochs on two ranks with the weights read whole, and by rows; every rank writes its losses and weights to
    `NAME-RANK.pt` in the folder, and HFExport the student to the folder NAME, whole or rows."""
    for name in ("whole", "rows"):
        L.seed_everything(3)
        seen = Losses()
        trainer = L.Trainer(
            **QUIET,
            devices=2,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            max_epochs=2,
            enable_checkpointing=False,
            callbacks=[seen, HFExport(str(folder / name))],
            use_distributed_sampler=False,
        )
        model = module(method, student, teachers, sharded_loading=name == "rows", **options)
        model.tokenizer = byte_tokenizer()
        assert all(p.is_meta == (name == "rows") for key, p in model.named_parameters() if "lora_" not in key)
        trainer.fit(model, datamodule=Halves())
        found = {"losses": torch.stack(seen.losses), "sizes": seen.sizes, "sharded": seen.sharded}
        found["hash"] = weights_hash(model.student, "")
        weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        found["weights"] = {n: weight.detach() for n, weight in weights.items()}
        found["buffers"] = dict(model.named_buffers())
        torch.save(found, folder / f"{name}-{trainer.global_rank}.pt")
