"""What test_distributed.py runs on every rank."""

from pathlib import Path

import lightning as L
import torch
from exact import SAMPLES, TAGS, module
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import QUIET, byte_tokenizer, routed_model, tiny_model
from torch.distributed.tensor import DTensor

from lightning_itk import batch as b
from lightning_itk.callbacks import HFExport, RunCard, run_facts
from lightning_itk.data import InstructionDataModule
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.models.loading import LoRA
from lightning_itk.models.precision import reshard
from lightning_itk.strategy import FSDP2Strategy


class Halves(L.LightningDataModule):
    """Each rank's part of every global batch of 8."""

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        size = 8 // ranks
        batches = []
        for start in range(0, len(SAMPLES), 8):
            whole = SAMPLES[start : start + 8]
            own = whole[rank * size : (rank + 1) * size]
            if not own:  # a rank without samples still takes its step
                own = [whole[0]._replace(labels=whole[0].labels * 0 + b.IGNORE_INDEX)]
            batches.append(b.pad(own, pad_id=0, teachers=TAGS))
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def val_dataloader(self):
        return self.train_dataloader()


def odd_data(data: str, folder: Path, strategy: str = "auto", ranks: int = 1) -> None:
    """DAE with attention on data whose last step leaves a rank without any sample; rank 0 writes the weights."""
    options = {"tokenizer": byte_tokenizer(), "max_length": 96, "num_proc": 1, "validation": 0, "shuffle": False}
    datamodule = InstructionDataModule(data, batch_size=4 // ranks, cache_dir=str(folder / "cache"), **options)
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    trainer = L.Trainer(
        **QUIET,
        devices=ranks,
        strategy=kind,
        max_epochs=1,
        enable_checkpointing=False,
    )
    model = module("dae")
    trainer.fit(model, datamodule=datamodule)
    weights = (p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.student.parameters())
    weights = torch.cat([weight.flatten() for weight in weights])
    if trainer.is_global_zero:
        torch.save(weights, folder / f"{strategy}.pt")


def fit(
    data: str,
    folder: Path,
    name: str,
    strategy: str = "auto",
    ranks: int = 1,
    rows: tuple[int, int] = (2, 2),
    ckpt: Path | None = None,
    method: str = "sft",
    dropout: float = 0.0,
    rows_only: bool = False,
) -> None:
    """Two epochs in steps of 8 rows, (batch size, accumulation) = `rows`; a checkpoint after every step in the folder
    `name`, and the final weights in `name`.pt. KD's models are read by `rows_only`, or were made in memory."""
    L.seed_everything(0)
    options = {"tokenizer": byte_tokenizer(), "max_length": 96, "batch_size": rows[0], "num_proc": 1, "validation": 0}
    datamodule = InstructionDataModule(data, cache_dir=str(folder / "cache"), **options)
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    trainer = L.Trainer(
        **QUIET,
        devices=ranks,
        strategy=kind,
        max_epochs=2,
        accumulate_grad_batches=rows[1],
        callbacks=[ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    common = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)}
    student = tiny_model("llama", 0, attention_dropout=dropout, tie_word_embeddings=method == "kd")
    if method == "moe":
        model = SFTModule(routed_model(0), router_weight=0.1, **common)
    elif method == "sft":
        model = SFTModule(student, **common)
    else:
        models = [student, tiny_model("llama", 1, tie_word_embeddings=True)]
        if rows_only:
            own = folder / name / str(trainer.global_rank)
            for place, loaded in zip(("student", "teacher"), models, strict=True):
                loaded.save_pretrained(own / place)
                byte_tokenizer().save_pretrained(own / place)
            models = [str(own / "student"), str(own / "teacher")]
        model = KDModule(*models, sharded_loading=rows_only, **common)
    trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt, weights_only=True)
    weights = (p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.student.parameters())
    weights = torch.cat([weight.flatten() for weight in weights])
    if trainer.is_global_zero:
        torch.save({"weights": weights, "step": trainer.global_step}, folder / f"{name}.pt")


def adapters(student: str, strategy: str, folder: Path) -> None:
    """Train LoRA adapters for an epoch of 2 ranks; a checkpoint, and an export by HFExport."""
    L.seed_everything(0)
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    trainer = L.Trainer(
        **QUIET,
        devices=2,
        strategy=kind,
        max_epochs=1,
        precision="bf16-mixed",
        callbacks=[ModelCheckpoint(folder, filename="trained"), HFExport(str(folder / "export"))],
        use_distributed_sampler=False,
    )
    model = SFTModule(student, lora=LoRA(r=4), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    trainer.fit(model, datamodule=Halves())


def half(strategy: str, ranks: int, precision: str, folder: Path) -> None:
    """KD for an epoch in mixed precision; the weights after it, and the dtypes that were seen."""
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    trainer = L.Trainer(
        **QUIET,
        devices=ranks,
        strategy=kind,
        precision=precision,
        max_epochs=1,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    model = module("kd")
    seen = {}
    layer = model.student.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda layer, args, output: seen.update(weight=str(layer.weight.dtype)))
    before = torch.cat([p.detach().flatten().clone() for p in model.student.parameters()])
    trainer.fit(model, datamodule=Halves())
    assert ", torch.float32, " in run_facts(trainer, model)["student"]
    parameters = list(model.student.parameters())
    weights = [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in parameters]
    state = trainer.optimizers[0].state[parameters[0]]
    seen |= {"kept": str(parameters[0].dtype), "state": str(state["exp_avg"].dtype) if "exp_avg" in state else ""}
    if trainer.is_global_zero:
        found = torch.cat([weight.flatten() for weight in weights])
        torch.save({"before": before, "after": found, "seen": seen}, folder / f"{strategy}-{precision}.pt")


def reductions(method: str, precision: str, nonfinite: bool, folder: Path) -> None:
    """An epoch of windows of 3, 3 and 1 micro-batches under FSDP2, gradients clipped: twice, reduced after each
    micro-batch and once per step. For both the weights, the figures, and how many reductions each step took.

    Args:
        nonfinite: The first micro-batch has a loss that is not finite, and its step is skipped.
    """
    known = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, name)]
    scatter, steps = getattr(torch.distributed, known[0]), [0]  # torch 2.13 has a new name for it

    def counting(*args, **kwargs):
        steps[-1] += 1
        return scatter(*args, **kwargs)

    class Steps(Callback):
        def on_before_optimizer_step(self, *_):
            steps.append(0)

    class Small(L.LightningDataModule):
        def train_dataloader(self):
            rank = self.trainer.global_rank
            batches = [b.pad(SAMPLES[2 * i + rank :: 14], pad_id=0, teachers=TAGS) for i in range(7)]
            return torch.utils.data.DataLoader(batches, batch_size=None)

    setattr(torch.distributed, known[0], counting)
    found = {}
    for each in (True, False):
        model, seen = module(method, nonfinite="skip" if nonfinite else "stop"), []

        def losses(batch, model=model, seen=seen):
            terms = type(model).losses(model, batch)
            seen.append(0)
            bad = nonfinite and len(seen) == 1
            return {name: term._replace(total=term.total * torch.inf) if bad else term for name, term in terms.items()}

        model.losses = losses
        steps[:] = [0]
        trainer = L.Trainer(
            **QUIET,
            devices=2,
            strategy=FSDP2Strategy(each, data_parallel_size=2, tensor_parallel_size=1),
            max_epochs=1,
            precision=precision,
            accumulate_grad_batches=3,
            gradient_clip_val=0.5,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            callbacks=[Steps()],
        )
        trainer.fit(model, datamodule=Small())
        weights = torch.cat([parameter.full_tensor().flatten() for parameter in model.student.parameters()])
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found[each] = {"weights": weights, "figures": figures, "steps": steps[:-1]}
    if trainer.is_global_zero:
        torch.save(found, folder / "found.pt")


def train(method: str, strategy: str, folder: Path) -> None:
    """Train for two epochs; rank 0 writes weights and metrics."""
    kind = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else strategy
    trainer = L.Trainer(
        **QUIET,
        devices=2,
        strategy=kind,
        max_epochs=2,
        callbacks=[ModelCheckpoint(folder, save_last=True), RunCard(), HFExport(str(folder / "export"))],
        use_distributed_sampler=False,
    )
    model = module(method)
    model.tokenizer = byte_tokenizer()
    trainer.fit(model, datamodule=Halves())
    state = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.student.named_parameters()
    }
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        torch.save({"weights": state, "metrics": metrics}, folder / "weights.pt")


def offloaded(strategy: str, folder: Path) -> None:
    """KD and its attention term on 2 ranks, with a teacher on the device and one in host memory: the weights after."""
    found, meshed = [], {"data_parallel_size": 2, "tensor_parallel_size": 1}
    for offload in (False, True):
        model = module("kd", teacher_offload=offload)
        trainer = L.Trainer(
            **QUIET,
            devices=2,
            strategy=ModelParallelStrategy(**meshed) if strategy == "fsdp2" else strategy,
            max_epochs=1,
            enable_checkpointing=False,
            use_distributed_sampler=False,
        )
        trainer.fit(model, datamodule=Halves())
        reshard(model)  # the root is whole after a validation
        weights = (p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.student.parameters())
        found.append(torch.cat([weight.flatten() for weight in weights]))
        layers = list(model.teacher.model.model.layers)
        if strategy == "fsdp2":
            groups = [group for layer in layers for group in layer._get_fsdp_state()._fsdp_param_groups]
            assert all(p.offload_to_cpu == offload for group in groups for p in group.fsdp_params)
        model.teacher.to("meta")  # a Trainer moves what is sharded, too
        assert {p.device.type for layer in layers for p in layer.parameters()} == {"cpu" if offload else "meta"}
        assert model.teacher.model.lm_head.weight.device.type == "meta"
        assert ("layers in host memory" in run_facts(trainer, model)["teacher 1"]) == offload
    if trainer.is_global_zero:
        torch.save(found, folder / "weights.pt")
