"""Whole training runs of a few steps, each in its trainer's own loop and in a process of its own.

Lightning's Trainer with the kit's modules, Hugging Face's Trainer, TRL's SFTTrainer and DistillationTrainer: the same
models, samples and optimizer, two micro-batches of unequal token counts to a step. A loop gets numbers only where its
tokens are those it was given, and its first loss and gradient agree with fp64.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from job import Example, Job, write_examples
from measure import quantiles
from settings import Settings, Unavailable, failures_as_rows, require

LONGEST_RUN = 690  # seconds of the whole subject on a CPU, whatever the budget is


class Size(NamedTuple):
    """How much is trained on: samples of up to `length` tokens, `batch` of them in each micro-batch of a step."""

    batch: int
    length: int
    steps: int
    rounds: int
    accumulate: int = 2


def _config(hidden: int, layers: int, heads: int, key_heads: int, feed: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": feed,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }


WHOLE = _config(576, 30, 9, 3, 1536, 49152)  # SmolLM2-135M's shape
CUT = _config(288, 10, 9, 3, 768, 16384)  # half as wide, a third as deep, a third of its vocabulary
SMALL = _config(32, 3, 4, 2, 48, 300)
TINY, CPU, CPU_WHOLE, FULL = Size(2, 24, 3, 1), Size(2, 160, 7, 2), Size(1, 256, 6, 2), Size(8, 1024, 8, 2)
METHODS = {"sft": ("lightning", "hf-trainer", "trl-sft"), "kd": ("lightning", "trl-kd")}
RUNS = {  # method and precision, most telling first
    "cpu": (("sft", "32-true"), ("kd", "32-true"), ("sft", "bf16-mixed"), ("kd", "bf16-mixed")),
    "cuda": (("kd", "bf16-true"), ("sft", "bf16-mixed"), ("kd", "bf16-mixed")),
}
RUNS["tiny"] = (*RUNS["cpu"], RUNS["cuda"][0])  # all that there is
VALUE_LIMIT = {"32-true": 1e-4, "bf16-mixed": 0.02, "bf16-true": 0.05}
GRADIENT_LIMIT = {"32-true": 1e-3, "bf16-mixed": 0.3, "bf16-true": 0.5}
"""Relative errors from which a loop counts as wrong. In bf16 all layers round, which is nobody's fault here."""


class Models(NamedTuple):
    """The model that is trained on its own, and the pair; see `job.Job`."""

    name: str
    alone: dict[str, Any]
    student: dict[str, Any]
    teacher: dict[str, Any]
    vocab: int

    @classmethod
    def of(cls, settings: Settings) -> "Models":
        """From `--model`: a folder, the whole random model, or one that is cut for a CPU."""
        if settings.model in (None, "whole"):
            whole = settings.model == "whole" or settings.device == "cuda"
            config = SMALL if settings.tiny else WHOLE if whole else CUT
            alone, layers = {"config": config, "seed": 0}, config["num_hidden_layers"]
            name = f"random, {layers} layers x {config['hidden_size']}"
            name += " (SmolLM2-135M's shape)" if config is WHOLE else ""
            vocab, teacher = config["vocab_size"], {"config": config, "seed": 1}
        else:
            path = Path(settings.model)
            config = json.loads((path / "config.json").read_text())
            alone = teacher = {"folder": str(path)}
            name, vocab, layers = path.name, config["vocab_size"], config["num_hidden_layers"]
        # Without a student of its own: the model's layers at even distances, two thirds of them.
        student = {"folder": settings.student} if settings.student else {**alone, "layers": -(-2 * layers // 3)}
        return cls(name, alone, student, teacher, vocab)


def made_up(count: int, size: Size, vocab: int) -> list[Example]:
    """Random tokens; samples of 40 to 100 % of the length, of which 25 to 75 % are the response."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(int(0.4 * size.length), size.length + 1, count)
    return [Example(rng.integers(3, vocab, n), int(n * rng.uniform(0.25, 0.75))) for n in lengths]


def from_records(path: str, folder: str, count: int, length: int) -> list[Example]:
    """The first records of a file that are one prompt and one response and fit, as the kit reads them; again from the
    start where they are too few."""
    import lightning_itk as itk

    with tempfile.TemporaryDirectory() as cache:
        data = itk.InstructionDataModule(
            path, 0.0, tokenizer=folder, batch_size=1, num_proc=1, max_length=length, cache_dir=cache
        )
        data.prepare_data()
        data.setup("fit")
        samples: Any = data.train_dataloader().samples
        found = []
        for sample in samples[np.arange(len(samples))]:
            learned = np.flatnonzero(np.asarray(sample.labels) >= 0)
            if len(learned) and learned[0] and learned[-1] - learned[0] + 1 == len(learned):
                found.append(Example(np.asarray(sample.input_ids)[: learned[-1] + 1], int(learned[0])))
    if not found:
        raise ValueError(f"{path}: no record of one prompt and one response with at most {length} tokens")
    return [found[i % len(found)] for i in range(count)]


def _examples(settings: Settings, size: Size, models: Models) -> list[Example]:
    count = size.batch * size.accumulate * size.steps
    if settings.data and settings.model:
        return from_records(settings.data, settings.model, count, size.length)
    return made_up(count, size, models.vocab)


def carry_out(job: Job, folder: Path, apart: bool) -> dict[str, Any]:
    """What became of a loop, run in a process of its own unless the run is a tiny one."""
    if not apart:
        import loops

        return loops.run(job)
    told, answer = folder / "job.json", folder / "result.json"
    told.write_text(json.dumps(dataclasses.asdict(job)))
    answer.unlink(missing_ok=True)
    variables = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    # One GPU: Hugging Face's Trainer would spread over all that it sees.
    variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if job.device == "cuda":
        torch.cuda.empty_cache()
    command = [sys.executable, str(Path(__file__).with_name("loops.py")), str(told), str(answer)]
    ran = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    if ran.returncode or not answer.exists():
        last = (ran.stderr.strip() or "no message").splitlines()[-1][:200]
        error = torch.OutOfMemoryError if "OutOfMemoryError" in last else RuntimeError
        raise error(f"its process ended with {ran.returncode}: {last}")
    return json.loads(answer.read_text())


References = dict[tuple[str, bool], tuple[float, np.ndarray]]
"""By method and whether the weights are bf16: the first step's loss and gradient in fp64."""


@dataclasses.dataclass
class Run:
    """One loop over all of its rounds."""

    job: Job
    row: dict[str, Any]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gradient_error: float = float("nan")
    over: bool = False  # it has its row

    def verdict(self, exact: float, tokens: list[int]) -> str | None:
        """Why this loop gets no numbers, or None."""
        first, precision = self.rounds[0], self.job.precision
        if first["tokens"] != tokens:
            return f"tokens of its steps are {first['tokens'][:3]}…, given were {tokens[:3]}…"
        if not abs(first["loss"] - exact) <= VALUE_LIMIT[precision] * abs(exact):
            return f"loss {first['loss']:.6g}, in fp64 {exact:.6g}"
        if not self.gradient_error <= GRADIENT_LIMIT[precision]:
            return f"gradient_error {self.gradient_error:.1e} is above {GRADIENT_LIMIT[precision]:.0e}"
        return None

    def numbers(self, tokens: list[int]) -> dict[str, Any]:
        """Medians over the steps of all rounds; memory and start-up, over the rounds."""

        def median(name: str) -> float:
            return statistics.median(found[name] for found in self.rounds)

        found = quantiles(sorted(ms for one in self.rounds for ms in one["ms"]))
        timed = slice(self.job.warmup, None)
        per_step = statistics.mean(tokens[timed])
        return {
            **found,
            "wall_ms": statistics.median(ms for one in self.rounds for ms in one["wall_ms"]),
            "tokens_per_s": 1e3 * per_step / found["ms"],
            "memory_mib": median("peak_mib"),
            "before_mib": median("before_mib"),
            "start_s": median("start_s"),
            "fill": sum(tokens[timed]) / sum(self.rounds[0]["positions"][timed]),
            "rounds": len(self.rounds),
            "loss": self.rounds[0]["loss"],
            "gradient_error": self.gradient_error,
        }


def run(settings: Settings) -> None:
    if settings.device == "cpu":
        limit = time.monotonic() + LONGEST_RUN
        settings = dataclasses.replace(settings, deadline=min(settings.deadline, limit))
    models = Models.of(settings)
    size = settings.pick(TINY, CPU_WHOLE if settings.model else CPU, FULL)
    examples = _examples(settings, size, models)
    window = size.batch * size.accumulate
    lengths = [len(example.ids) for example in examples]
    tokens = [sum(lengths[i : i + window]) for i in range(0, len(lengths), window)]
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder, "examples.npz"), examples)
        runs = [
            planned(provider, method, precision, models, size, Path(folder), settings.device)
            for method, precision in RUNS["tiny" if settings.tiny else settings.device]
            for provider in METHODS[method]
        ]
        references: References = {}
        for one in runs * size.rounds:  # each once, then each again
            if not settings.over and not one.over:
                _once(one, references, Path(folder), settings, tokens)
    for one in runs:
        if one.rounds and not one.over:
            settings.add(**one.row, status="ok", **one.numbers(tokens))
        elif not one.over:
            settings.add(**one.row, status="skipped", reason="time budget")


def planned(provider: str, method: str, precision: str, models: Models, size: Size, folder: Path, device: str) -> Run:
    """A loop that has not begun."""
    job = Job(
        provider=provider,
        method=method,
        precision=precision,
        device=device,
        student=models.student if method == "kd" else models.alone,
        teacher=models.teacher,
        samples=str(folder / "examples.npz"),
        gradient=str(folder / "gradient.bin"),
        batch=size.batch,
        accumulate=size.accumulate,
        steps=size.steps,
    )
    shape = {"method": method, "precision": precision, "model": models.name}
    shape |= {"batch": size.batch, "accumulate": size.accumulate, "length": size.length}
    dtype = "float32" if precision == "32-true" else "bfloat16"
    return Run(job, {"subject": "whole_step", "mode": "step", "dtype": dtype, "provider": provider, "shape": shape})


def _reference(one: Run, references: References, folder: Path, settings: Settings) -> bool:
    """Have the fp64 answers of a method and its weights, once; whether they are there."""
    key = (one.job.method, one.job.precision == "bf16-true")
    if key not in references:
        with failures_as_rows(settings, {**one.row, "provider": "reference"}):
            found = carry_out(dataclasses.replace(one.job, provider="reference"), folder, not settings.tiny)
            references[key] = found["loss"], np.fromfile(one.job.gradient)
    return key in references


def _once(one: Run, references: References, folder: Path, settings: Settings, tokens: list[int]) -> None:
    """A round of a loop; what ends it for good becomes its row."""
    rows = len(settings.rows)
    with failures_as_rows(settings, one.row):
        require(one.job.provider)
        if not _reference(one, references, folder, settings):
            raise Unavailable("there are no fp64 answers to compare with")
        found = carry_out(one.job, folder, not settings.tiny)
        if one.job.precision == "bf16-mixed" and not found["autocast"]:
            raise Unavailable("told to compute in bf16, it computes in fp32: no autocast in its forward pass")
        one.rounds.append(found)
        if len(one.rounds) == 1:
            loss, gradient = references[one.job.method, one.job.precision == "bf16-true"]
            own = np.fromfile(one.job.gradient)
            one.gradient_error = float(np.linalg.norm(own - gradient) / np.linalg.norm(gradient))
            if reason := one.verdict(loss, tokens):
                settings.add(**one.row, status="wrong", reason=reason, gradient_error=one.gradient_error)
    one.over = len(settings.rows) > rows
