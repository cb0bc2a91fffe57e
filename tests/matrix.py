"""Every method on one, two and four ranks, by DDP and FSDP2, against one process: trained, saved, resumed, exported.

`make ranks` runs all of it and prints the differences; test_matrix.py runs a part.
"""

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from processes import run_ranks
from safetensors.torch import load_file
from tiny import QUIET, byte_tokenizer, tiny_model
from torch.distributed.tensor import DTensor

import lightning_itk as itk
from lightning_itk import cli
from lightning_itk.callbacks import HFExport
from lightning_itk.models.loading import LoRA
from lightning_itk.models.weights import CheckpointWeights

METHODS = ("sft", "kd", "dae", "lora")
STEPS, SAVED_AT = 6, 3  # 42 records in steps of 8 rows, the last of 2: with four ranks, three have none


class Place(NamedTuple):
    """How many ranks, and what holds them together."""

    strategy: str
    ranks: int

    def __str__(self) -> str:
        return "alone" if self.ranks == 1 else f"{self.strategy} x {self.ranks}"


class Run(NamedTuple):
    """A training run, from its beginning or from another's checkpoint."""

    method: str
    place: Place
    origin: Place | None = None

    @property
    def name(self) -> str:
        return "-".join(str(part).replace(" ", "") for part in self if part)


ALONE = Place("auto", 1)
PLACES = tuple(Place(strategy, ranks) for ranks in (2, 4) for strategy in ("ddp", "fsdp2"))


def prepare(folder: Path) -> None:
    """Records for two teachers, a student, and teachers of twice its depth and heads."""
    rows = [
        {"prompt": "say " + "ab" * (i % 7), "completion": "cd" * (1 + 5 * i % 17) + str(i), "is_domain": i % 3 == 0}
        for i in range(42)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    larger = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    for name, seed, size in (("student", 0, {}), ("reference", 1, larger), ("expert", 2, larger)):
        tiny_model("llama", seed, **size).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)


def module(folder: Path, method: str) -> itk.InstructionModule:
    student, reference, expert = (str(folder / name) for name in ("student", "reference", "expert"))
    common = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)}
    attention = itk.AttentionLoss(weight=0.5)
    if method == "kd":
        return itk.KDModule(student, reference, ce_weight=0.3, attention=attention, **common)
    if method == "dae":
        return itk.DAEModule(student, {"reference": reference, "expert": expert}, attention=attention, **common)
    return itk.SFTModule(student, lora=LoRA(r=4) if method == "lora" else None, **common)


def train(folder: Path, run: Run) -> None:
    """One epoch, with a checkpoint in its middle and an export at its end; rank 0 writes what was trained."""
    L.seed_everything(0, verbose=False)
    strategy, ranks = run.place
    rows = {1: (2, 4), 2: (2, 2), 4: (2, 1)}[ranks]
    options = {"tokenizer": byte_tokenizer(), "max_length": 96, "num_proc": 1, "validation": 0}
    data = itk.InstructionDataModule(
        str(folder / "records.jsonl"), batch_size=rows[0], cache_dir=str(folder / "cache"), **options
    )
    here = folder / run.name
    sharded = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    trainer = L.Trainer(
        **QUIET,
        devices=ranks,
        strategy=sharded if strategy == "fsdp2" else strategy,
        max_epochs=1,
        accumulate_grad_batches=rows[1],
        callbacks=[
            ModelCheckpoint(here, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1),
            HFExport(str(here / "export"), max_shard_size="60KB"),
        ],
    )
    model = module(folder, run.method)
    trainer.fit(model, datamodule=data, ckpt_path=_halfway(folder, run), weights_only=True)
    assert trainer.global_step == STEPS
    trained = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in trained.items()}
    if trainer.is_global_zero:
        torch.save(weights, here / "weights.pt")


def _halfway(folder: Path, run: Run) -> Path | None:
    """The checkpoint that a run begins with."""
    return folder / Run(run.method, run.origin).name / f"step={SAVED_AT}.ckpt" if run.origin else None


def train_all(folder: Path, runs: list[Run]) -> None:
    """Runs of one place, one after the other, in the processes of this group."""
    for run in runs:
        train(folder, run)


class Row(NamedTuple):
    """How far a run is from one process without interruption: the largest difference of a weight, and the norm of all
    beside how far they moved. And its exports, by HFExport and by the command out of its last checkpoint."""

    run: Run
    largest: float
    relative: float
    exported: float


def table(folder: Path, runs: Iterable[Run]) -> list[Row]:
    """Do these runs, those with a checkpoint for others first, and compare each with one process."""
    runs = list(runs)
    methods = dict.fromkeys(run.method for run in runs)
    whole = [Run(method, ALONE) for method in methods] + [Run(run.method, run.origin) for run in runs if run.origin]
    for wave in (whole, runs):
        todo = [run for run in dict.fromkeys(wave) if not (folder / run.name).exists()]
        for place in dict.fromkeys(run.place for run in todo):
            own = functools.partial(train_all, folder, [run for run in todo if run.place == place])
            if place == ALONE:
                own()
            else:
                run_ranks(own, ranks=place.ranks)
    return [_row(folder, run) for run in runs]


def _row(folder: Path, run: Run) -> Row:
    mine, alone = (torch.load(folder / r.name / "weights.pt") for r in (run, Run(run.method, ALONE)))
    assert mine.keys() == alone.keys()
    before = dict(module(folder, run.method).student.named_parameters())
    flat = [torch.cat([tensors[name].detach().flatten() for name in alone]) for tensors in (mine, alone, before)]
    if run.method == "lora":  # its A is random
        flat[2] = torch.zeros_like(flat[2])
    moved = float((flat[1] - flat[2]).norm())
    assert moved > 0.1
    if run.origin:  # a resumed run goes on from there, and does not stand still
        halfway = CheckpointWeights(_halfway(folder, run), "student.").read(alone)
        flat.append(torch.cat([halfway[name].flatten() for name in alone]))
        assert float((flat[0] - flat[3]).norm()) > 0.05 * moved
    off = flat[0] - flat[1]
    return Row(run, float(off.abs().max()), float(off.norm()) / moved, exports(folder, run))


def exports(folder: Path, run: Run) -> float:
    """The largest difference between the two exports of a run, and between them and its weights."""
    here = folder / run.name
    checkpoint, out = here / f"step={STEPS}.ckpt", here / "out"
    assert checkpoint.is_dir() == (run.place.strategy == "fsdp2")
    shutil.rmtree(out, ignore_errors=True)
    command = ["export", "--ckpt", str(checkpoint), "--output", str(out), "--max_shard_size", "30KB"]
    assert cli.main(command) == 0
    found = []
    for place in (here / "export" / "last", out):
        files = sorted(place.glob("model-*.safetensors"))
        assert len(files) > 1
        found.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    one, two = found
    trained = torch.load(here / "weights.pt")
    if run.method == "lora":
        student = module(folder, "lora").student
        student.load_state_dict(trained, strict=False)
        trained = dict(student.merge_and_unload().named_parameters())
    assert one.keys() == two.keys() == trained.keys()
    return max(float((a - b).abs().max()) for n in one for a, b in ((one[n], two[n]), (one[n], trained[n].detach())))


def everything(methods: Iterable[str] = METHODS) -> list[Run]:
    """Every method at every place; saved on two ranks, resumed everywhere."""
    runs = [Run(method, place) for method in methods for place in PLACES]
    return runs + [
        Run(method, place, origin)
        for method in methods
        for origin in PLACES
        if origin.ranks == 2
        for place in (ALONE, *PLACES)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS))
    torch.set_num_threads(1)  # as the ranks have
    folder = Path(tempfile.mkdtemp(prefix="itk-ranks-"))
    start = time.perf_counter()
    try:
        prepare(folder)
        rows = table(folder, everything(parser.parse_args().methods.split(",")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        begun = f"from {row.run.origin}" if row.run.origin else "whole"
        print(
            f"{row.run.method:5} {row.run.place!s:10} {begun:16} largest {row.largest:.1e}  relative {row.relative:.1e}"
            f"  exports {row.exported:.1e}"
        )
    worst = max(row.relative for row in rows)
    print(f"{len(rows)} runs in {time.perf_counter() - start:.0f} s, largest relative difference {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
