"""The kinds of runs that are killed: method, layout, ranks, what is saved and when."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import byte_tokenizer, tiny_model

STEPS = {"every_n_train_steps": 4, "save_last": True}
CLOCK = {"train_time_interval": "0:00:00.300000", "save_last": "link"}  # inside accumulation windows
VALIDATION = {"every_n_epochs": 1, "save_last": True}  # so does the validation, every 20 micro-batches

SMALL = {"hidden_size": 64, "attention_dropout": 0.1}
LARGE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "attention_dropout": 0.1}  # 26 MB


@dataclass(frozen=True)
class Arm:
    """One kind of run.

    Args:
        name: its folder and its line in the summary.
        method: sft, kd or dae; the last two with the attention loss.
        packing: rows of several samples.
        strategy: auto (one rank), ddp or fsdp2 (two ranks).
        saving: arguments of ModelCheckpoint.
        size: of the student.
        records: of the training file.
        cached: more records, for validation, that only take time to tokenize.
        validate: micro-batches on a rank between two validations.
    """

    name: str
    method: str = "sft"
    packing: bool = False
    strategy: str = "auto"
    saving: dict[str, Any] = field(default_factory=lambda: STEPS)
    size: dict[str, Any] = field(default_factory=lambda: SMALL)
    records: int = 301
    cached: int = 0
    validate: int = 20

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "auto" else 2

    def write(self, folder: Path) -> Path:
        """Models, records and the configuration; returns the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        _save_model(folder / "student", seed=0, **self.size)
        for name, seed in {"reference": 1, "expert": 2}.items():
            if self.method == "dae" or (self.method, name) == ("kd", "reference"):
                _save_model(folder / name, seed=seed, num_hidden_layers=4)
        _write_records(folder / "train.jsonl", self.records)
        if self.cached:
            _write_records(folder / "validation.jsonl", self.cached)
        path = folder / "config.yaml"
        path.write_text(json.dumps(self.config(folder)))
        return path

    def config(self, folder: Path) -> dict[str, Any]:
        """What `fit --config` reads; a run writes into its working directory."""
        init: dict[str, Any] = {"student": str(folder / "student")}
        init |= {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}, "warmup": 0.2}
        if self.method != "sft":
            init["attention"] = {"weight": 0.5}
        if self.method == "kd":
            init |= {"teacher": str(folder / "reference"), "ce_weight": 0.3}
        if self.method == "dae":
            init["teachers"] = {name: str(folder / name) for name in ("reference", "expert")}
        strategy: Any = self.strategy
        if strategy == "fsdp2":
            sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
            strategy = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": sizes}
        saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": self.saving}
        trainer = {"accelerator": "cpu", "devices": self.ranks, "strategy": strategy, "max_epochs": 2}
        trainer |= {"accumulate_grad_batches": 3, "val_check_interval": self.validate // self.ranks}
        trainer |= {
            "limit_val_batches": 4,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        }
        trainer["callbacks"] = [{"class_path": "chaos.run.Trace"}, saving]
        data = {"train": str(folder / "train.jsonl"), "cache_dir": "cache", "packing": self.packing}
        data |= {"validation": str(folder / "validation.jsonl") if self.cached else 0.1}
        data |= {"max_length": 96, "batch_size": 2, "num_proc": 2}
        model = {"class_path": f"lightning_itk.{self.method.upper()}Module", "init_args": init}
        return {"seed_everything": 0, "trainer": trainer, "model": model, "data": data}


def _save_model(folder: Path, seed: int, **changes: Any) -> None:
    tiny_model("llama", seed, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _write_records(path: Path, count: int) -> None:
    """Prompts with completions of very different lengths, two thirds of them from one domain."""
    rng = random.Random(0)
    rows = (
        {"prompt": "say " + "ab" * rng.randint(1, 8), "completion": "cd" * rng.randint(1, 20) + str(i)}
        | {"is_domain": i % 3 == 0}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ARMS = [
    Arm("sft", records=601),
    Arm("sft packed, by time", packing=True, saving=CLOCK, records=1201),
    Arm("sft, large saves", size=LARGE, records=76),
    Arm("sft, large cache", cached=40_000, records=301),
    Arm("kd + attention", "kd", records=301),
    Arm("kd + attention packed, large cache", "kd", packing=True, cached=20_000, records=451),
    Arm("dae + attention, by time", "dae", saving=CLOCK, records=301),
    Arm("dae + attention packed", "dae", packing=True, saving=VALIDATION, records=451),
    Arm("sft ddp, large saves", strategy="ddp", size=LARGE, records=76),
    Arm("kd + attention packed ddp", "kd", packing=True, strategy="ddp", records=601),
    Arm("dae + attention ddp, large cache", "dae", strategy="ddp", cached=20_000, records=301),
    Arm("sft fsdp2, large saves", strategy="fsdp2", size=LARGE, records=76),
    Arm("kd + attention fsdp2", "kd", strategy="fsdp2", records=151),
    Arm("dae + attention packed fsdp2, by time", "dae", packing=True, strategy="fsdp2", saving=CLOCK, records=301),
]
