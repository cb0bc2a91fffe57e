"""What test_sharded_loading.py runs on every rank."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import Halves
from tiny import QUIET, byte_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_itk.callbacks import HFExport
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.methods.sharding import shard
from lightning_itk.models.loading import LoRA, load_causal_lm, weights_hash
from lightning_itk.models.sharded_loading import Deferred, deferred_loading, is_deferred, read_weights


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


def read(cases: list[tuple[str, str]], folder: Path) -> None:
    """Load models by (folder, dtype) whole and by rows on two ranks; write what differs to `RANK.json`."""
    torch.distributed.init_process_group("gloo")
    mesh, wrong = init_device_mesh("cpu", (2,)), {}
    for number, (name, dtype) in enumerate(cases):
        whole = load_causal_lm(name, dtype=dtype)
        with deferred_loading():
            rows = load_causal_lm(name, dtype=dtype)
        late = is_deferred(rows)
        shard(rows, mesh, "32-true")
        read_weights(rows, mesh)
        label = f"{number} {whole.config.model_type}"
        wrong[label] = [] if late else ["not deferred"]
        wrong[label] += [key for key, p in rows.named_parameters() if not isinstance(p, DTensor)]
        tied = rows.get_input_embeddings().weight is rows.get_output_embeddings().weight
        if isinstance(rows.get_input_embeddings(), FSDPModule) == tied:
            wrong[label].append("units")
        rows.requires_grad_(False)
        found = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors(rows)}
        expected = dict(tensors(whole))
        wrong[label] += sorted(found.keys() ^ expected.keys())
        for key, tensor in expected.items():
            if found[key].dtype != tensor.dtype or not found[key].equal(tensor):
                wrong[label].append(key)
        if weights_hash(rows, name) != weights_hash(whole, name):
            wrong[label].append("hash")
        if rows.generation_config.to_dict() != whole.generation_config.to_dict() or rows.training:
            wrong[label].append("settings")
        del whole, rows
    (folder / f"{mesh.get_rank()}.json").write_text(json.dumps(wrong))


def tensors(model):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers()


def fail_alone(student: str, folder: Path) -> None:
    """One of two ranks cannot read; each writes what it raises."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    with deferred_loading():
        model = load_causal_lm(student)
    shard(model, mesh, "32-true")
    if mesh.get_rank() == 1:
        Deferred.twin = lambda *_: (_ for _ in ()).throw(OSError("the disk is gone"))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the disk is gone") as error:
        read_weights(model, mesh)
    (folder / f"{mesh.get_rank()}").write_text(str(error.value))
