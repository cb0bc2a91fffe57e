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
SIZES = {"pool": 1200, "prompts": 300, "mixture": 2000, "shop_test": 100}
"""Records that are scored for the choice of data; prompts that four teachers answer; general and shop together; shop
questions that are held out."""


@dataclass(frozen=True)
class Arm:
    """One way of training, run once per seed.

    Args:
        question: the table it stands in.
        name: of the row.
        model: overlay of `model.init_args`; "class" is the module's name.
        student: a key of PRUNED, or "whole": the model itself.
        records: how many training records, the first; None = all.
        steps: optimizer steps of 8 records.
        data: what `materials.Materials.train` makes.
        tokens_of: as many response tokens as `steps` steps of these data have, in place of `steps`.
    """

    question: str
    name: str
    model: dict[str, Any] = field(default_factory=dict)
    student: str = "21"
    records: int | None = None
    steps: int = 50
    data: str = "train"
    tokens_of: str | None = None

    @property
    def key(self) -> str:
        return f"{self.question}/{self.name}"

    @property
    def design(self) -> str:
        """A hash of all that the figures depend on: a changed arm is another arm."""
        layers = PRUNED.get(self.student)
        content = [self.model, self.student, self.records, self.steps, BASE, RECORDS, CHARACTERS, layers]
        if self.data != "train":
            content += [self.data, self.tokens_of, SIZES, SCORING if self.question == "lp" else None]
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

SCORING: dict[str, Any] = {"epochs": 1, "lr": 1e-4}  # of the run that scores the pool
EXPERT: dict[str, Any] = {"steps": 100, "records": 1600, "lr": 1e-4}  # of the model's training on the shop

SFT: dict[str, Any] = {"class": "SFTModule"}
KD: dict[str, Any] = {"class": "KDModule"}
DAE: dict[str, Any] = {"class": "DAEModule"}
THIRDS = [(by, third) for by in ("135M", "21 layers") for third in ("lowest", "middle", "highest")]
SOURCES = {
    "human": "Dolly's humans",
    "greedy": "the 135M, greedy",
    "drawn": "the 135M, temperature 1",
    "pruned": "21 layers, greedy",
}


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
    *(
        Arm("dae", f"{name}, {share} % shop", model, data=f"shop-{share}")
        for share in (10, 50)
        for name, model in (("SFT on both", SFT), ("KD on both", KD), ("DAE", DAE))
    ),
    Arm("lp", "random", SFT, "whole", data="random"),
    *(Arm("lp", f"{third} by the {by}", SFT, "whole", data=f"lp-{by}-{third}") for by, third in THIRDS),
    Arm("lp", "longest", SFT, "whole", data="longest"),
    Arm("lp", "shortest", SFT, "whole", data="shortest"),
    *(
        Arm("lp", f"{name}, equal tokens", SFT, "whole", data=data, tokens_of="random")
        for name, data in (
            ("lowest by the 135M", "lp-135M-lowest"),
            ("highest by the 135M", "lp-135M-highest"),
            ("longest", "longest"),
            ("shortest", "shortest"),
        )
    ),
    *(Arm("car", name, SFT, data=f"car-{source}") for source, name in SOURCES.items()),
    Arm("attention", "KD, random weights", KD, student="random"),
    Arm("attention", "KD + attention 1, random weights", attention(1.0), student="random"),
    Arm("attention", "KD + attention 1, layers by the formula", attention(1.0, layers="formula")),
    Arm("attention", "KD + attention 1, last quarter", attention(1.0, layers=[15, 16, 17, 18, 19, 20])),
)
