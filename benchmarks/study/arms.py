"""The experiments as data: what is trained, as overlays of one base configuration."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

RECORDS = {"train": 4000, "test": 500, "choice": 100}  # of Dolly's records of up to 600 characters, by content hash
CHARACTERS = 600
PRUNED = {
    "21": "21",
    "15": "15",
    "random": "21",
}  # student -> `prune --layers`; random: the shape of 21 layers, new weights
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One way of training, run once per seed.

    Args:
        question: the table it stands in.
        name: of the row.
        model: overlay of `model.init_args`; "class" is the module's name.
        student: a key of PRUNED.
        records: how many training records, the first; None = all.
        steps: optimizer steps of 8 records.
    """

    question: str
    name: str
    model: dict[str, Any] = field(default_factory=dict)
    student: str = "21"
    records: int | None = None
    steps: int = 50

    @property
    def key(self) -> str:
        return f"{self.question}/{self.name}"

    @property
    def design(self) -> str:
        """A hash of all that the figures depend on: a changed arm is another arm."""
        content = [self.model, self.student, self.records, self.steps, BASE, RECORDS, CHARACTERS, PRUNED[self.student]]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=6).hexdigest()


BASE: dict[str, Any] = {
    "model": {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
        "lr_scheduler": "linear",
        "warmup": 0.1,
    },
    "data": {"max_length": 192, "batch_size": 8, "eval_batch_size": 16, "validation": 0, "num_proc": 1},
    "trainer": {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0, "enable_checkpointing": False},
}

SFT: dict[str, Any] = {"class": "SFTModule"}
KD: dict[str, Any] = {"class": "KDModule"}


def attention(weight: float, **more: Any) -> dict[str, Any]:
    return {**KD, "attention": {"weight": weight, **more}}


ARMS = (
    Arm("kd", "SFT", SFT),
    Arm("kd", "KD", KD),
    Arm("kd", "KD + attention 1", attention(1.0)),
    Arm("kd", "KD + CE", {**KD, "ce_weight": 1.0}),
    Arm("kd", "KD reverse", {**KD, "kind": "reverse"}),
    Arm("kd", "KD jsd", {**KD, "kind": "jsd"}),
    Arm("kd", "KD + attention 0.1", attention(0.1)),
    Arm("kd", "KD + attention 10", attention(10.0)),
    Arm("few", "SFT, 100 records", SFT, records=100),
    Arm("few", "KD, 100 records", KD, records=100),
    Arm("few", "SFT, 1,000 records", SFT, records=1000),
    Arm("few", "KD, 1,000 records", KD, records=1000),
    Arm("deep", "SFT, 15 layers", SFT, student="15"),
    Arm("deep", "KD, 15 layers", KD, student="15"),
    Arm("deep", "KD + attention 1, 15 layers", attention(1.0), student="15"),
    Arm("attention", "KD, random weights", KD, student="random"),
    Arm("attention", "KD + attention 1, random weights", attention(1.0), student="random"),
    Arm("attention", "KD + attention 1, layers by the formula", attention(1.0, layers="formula")),
    Arm("attention", "KD + attention 1, last quarter", attention(1.0, layers=[15, 16, 17, 18, 19, 20])),
)
