"""The quickstart: every method of the kit on the toy world, on two CPU cores, in a few minutes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_itk.data.module import InstructionDataModule, Sources
from lightning_itk.data.sources import Source
from lightning_itk.data.subset import Subset
from lightning_itk.files import atomic_write
from lightning_itk.methods.dae import DAEModule
from lightning_itk.methods.distillation import AttentionLoss
from lightning_itk.methods.kd import KDModule
from lightning_itk.methods.module import InstructionModule
from lightning_itk.methods.sft import SFTModule
from lightning_itk.metrics import ExactMatch
from lightning_itk.models.export import export
from lightning_itk.models.generation import Generator
from lightning_itk.recorder import ResponseLossRecorder
from lightning_itk.report.pictures import markdown_table
from lightning_itk.toy import world as toy
from lightning_itk.toy.display import StageBar, quiet
from lightning_itk.toy.questions import DOMAINS, Domain, make_questions

TEACHER_STEPS, EXPERT_STEPS, STUDENT_STEPS, SUBSET_STEPS = 300, 150, 300, 200
TEACHER_LR, STUDENT_LR = 3e-3, 6e-3
BATCH_SIZE, QUESTIONS = 64, 150
RANDOM_THIRDS = 3
_MARK = "itk_quickstart.json"  # says that a quickstart made its folder
NOISE = (
    f"Every student stage has the same steps and learning rate. This is one seed and {QUESTIONS} questions per domain, "
    "and models this small learn in leaps: the spread of the random thirds below shows how much is luck."
)

Figures = dict[str, dict[str, float]]  # domain -> loss, exact_match


def quickstart(
    output: Path = Path("runs/quickstart"), seed: int = 0, steps_scale: float = 1.0, overwrite: bool = False
) -> int:
    """Train, distil and align tiny models on toy data, and say how good each became.

    Args:
        output: Folder for the data, the models and the results; made if needed, and new or empty.
        seed: Of the weights, the data and their order.
        steps_scale: Factor on the number of training steps; below 1 for a quick look whose figures mean nothing.
        overwrite: Write over an earlier quickstart; a folder with anything else in it is never touched.
    """
    if not 0 < steps_scale < float("inf"):
        raise ValueError(f"steps_scale must be above 0, got {steps_scale}")
    claim(Path(output), overwrite)
    start = time.perf_counter()
    with quiet():
        run = _Run(Path(output), seed, steps_scale)
        run.all()
    run.console.print(f"Done in {(time.perf_counter() - start) / 60:.1f} minutes.")
    return 0


def claim(folder: Path, overwrite: bool = False) -> None:
    """Make the folder of a quickstart and mark it as one.

    Raises:
        ValueError: it cannot be made, is an earlier quickstart's and `overwrite` is False, or is anybody else's.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder")
    if folder.is_dir() and (found := sorted(path.name for path in folder.iterdir())):
        if _MARK not in found:
            raise ValueError(f"{folder}: holds {found[0]}, which no quickstart wrote: name another folder")
        if not overwrite:
            raise ValueError(f"{folder}: exists already; --overwrite true replaces an earlier quickstart")
    with atomic_write(folder / _MARK) as file:
        file.write(b"{}\n")


@dataclass
class _Run:
    """What the stages share."""

    output: Path
    seed: int
    scale: float
    console: Console = field(default_factory=Console)
    results: dict[str, Any] = field(default_factory=dict)

    def all(self) -> None:
        out = self.output
        self.say(f"Making the toy world in {out / 'world'}: two domains, a small student, a larger teacher")
        records = {"general": 1500, "shop": 1200, "test": 200}
        if self.scale < 1:
            records = {name: max(50, int(n * self.scale)) for name, n in records.items()}
        self.world = toy.write_world(out / "world", **records, seed=self.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(self.world.student)
        self.questions = {
            domain: make_questions(domain, "test", min(QUESTIONS, records["test"]), self.seed) for domain in DOMAINS
        }
        general, shop = (str(self.world.train[domain]) for domain in DOMAINS)
        mixed: Sources = [Source(general, teacher="reference"), Source(shop, teacher="expert")]
        student, teacher = str(self.world.student), str(out / "teacher")

        table: dict[str, Figures] = {}
        table["student, untrained"] = self.measure(AutoModelForCausalLM.from_pretrained(student))

        big = str(self.world.teacher)
        table["teacher (SFT on general)"] = self.train(
            "SFT of the teacher on general", self.sft(big, TEACHER_LR), general, TEACHER_STEPS, save="teacher"
        )
        table["expert (SFT on shop)"] = self.train(
            "SFT of the expert on shop", self.sft(big, TEACHER_LR), shop, EXPERT_STEPS, save="expert"
        )

        scores = out / "scores.parquet"
        table["SFT on general"] = self.train(
            "SFT of the student on general, recording response losses",
            self.sft(student),
            general,
            STUDENT_STEPS,
            callbacks=[ResponseLossRecorder(str(scores), overwrite=True)],
        )
        table["KD on general"] = self.train(
            "KD of the student from the teacher",
            KDModule(student, teacher, **self.settings()),
            general,
            STUDENT_STEPS,
            save="student-kd",
        )
        table["KD + attention on general"] = self.train(
            "KD with the attention loss",
            KDModule(student, teacher, attention=AttentionLoss(weight=1.0), **self.settings()),
            general,
            STUDENT_STEPS,
        )
        tuned = str(out / "student-kd")
        table["KD, then SFT on both"] = self.train(
            "SFT of the KD student on both", self.sft(tuned), mixed, STUDENT_STEPS
        )
        teachers = {"reference": teacher, "expert": str(out / "expert")}
        table["KD, then DAE on both"] = self.train(
            "DAE of the KD student from teacher and expert",
            DAEModule(tuned, teachers, **self.settings()),
            mixed,
            STUDENT_STEPS,
            save="student",
        )
        selection = self.select(student, general, scores)
        self.results = {"seed": self.seed, "steps_scale": self.scale, "models": table, "selection": selection}
        self.report()

    # Training and measuring

    def settings(self, lr: float = STUDENT_LR) -> dict[str, Any]:
        return {
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
            "lr_scheduler": "cosine",
            "warmup": 0.1,
        }

    def sft(self, student: str, lr: float = STUDENT_LR) -> SFTModule:
        return SFTModule(student, **self.settings(lr))

    def data(self, train: Sources, **options: Any) -> InstructionDataModule:
        return InstructionDataModule(
            train,
            **{"validation": 0.0, **options},
            tokenizer=self.tokenizer,
            max_length=256,
            batch_size=BATCH_SIZE,
            eval_batch_size=2 * BATCH_SIZE,
            num_proc=1,
            cache_dir=str(self.output / "cache"),
            seed=self.seed,
        )

    def train(
        self,
        title: str,
        module: InstructionModule,
        train: Sources,
        steps: int,
        *,
        save: str | None = None,
        subset: Subset | None = None,
        callbacks: Sequence[Callback] = (),
        domains: Sequence[Domain] = DOMAINS,
    ) -> Figures:
        """Train a module on files, measure its student on the held-out questions, and save it if named."""
        L.seed_everything(self.seed, verbose=False)
        steps, start = max(2, round(steps * self.scale)), time.perf_counter()
        bar = StageBar(title, steps, self.console)
        trainer = self.trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=[bar, *callbacks])
        trainer.fit(module, self.data(train, subset=subset))
        student = module.student
        assert isinstance(student, PreTrainedModel)
        figures = self.measure(student, domains)
        exact = ", ".join(f"{domain} {figures[domain]['exact_match']:.0%}" for domain in domains)
        self.say(f"{title}: {steps} steps, {time.perf_counter() - start:.0f} s; exact match {exact}")
        if save:
            export(student, self.tokenizer, self.output / save)
        return figures

    def trainer(self, **options: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10,
            **options,
        )

    def measure(self, student: PreTrainedModel, domains: Sequence[Domain] = DOMAINS) -> Figures:
        """Loss and exact match of greedy answers on the held-out questions."""
        figures: Figures = {}
        for domain in domains:
            data = self.data(str(self.world.train[domain]), validation=str(self.world.test[domain]))
            (logged,) = self.trainer().validate(SFTModule(student), data, verbose=False)
            metric = ExactMatch()
            questions = self.questions[domain]
            prompts = [data.encoder.prompt([{"role": "user", "content": q.prompt}]) for q in questions]
            metric.update(answer(student, self.tokenizer, prompts), [q.answer for q in questions])
            figures[domain] = {"loss": logged["val/response_loss"], "exact_match": float(metric.compute())}
        return figures

    def select(self, student: str, train: str, scores: Path) -> dict[str, Any]:
        """Train on a third of the data, chosen by learning percentage or at random; the steps are the same for all."""
        chosen = {"lowest third": Subset(str(scores), "lp", 1 / 3, "lowest")}
        for number in range(RANDOM_THIRDS):
            chosen[f"random third {number + 1}"] = Subset(str(scores), "lp", 1 / 3, "random", seed=number)
        rows = {
            name: self.train(
                f"SFT on the {name}", self.sft(student), train, SUBSET_STEPS, subset=subset, domains=["general"]
            )["general"]
            for name, subset in chosen.items()
        }
        return {"rows": rows, "verdict": verdict(rows)}

    # Results

    def report(self) -> None:
        models, selection = self.results["models"], self.results["selection"]
        head = ["model", *(f"{domain} {what}" for domain in DOMAINS for what in ("loss", "exact"))]
        rows = [[name, *_cells(*(figures[domain] for domain in DOMAINS))] for name, figures in models.items()]
        lp_head = ["trained on", "general loss", "general exact"]
        lp_rows = [[name, *_cells(figures)] for name, figures in selection["rows"].items()]
        self.show("Held-out questions: loss (nats per token) and exact matches", head, rows)
        self.say(NOISE)
        self.show("Learning percentage: which third of general to train on", lp_head, lp_rows)
        self.say(selection["verdict"])
        tables = markdown_table(head, rows), NOISE + "\n", markdown_table(lp_head, lp_rows), selection["verdict"]
        for name, text in {
            "results.json": json.dumps(self.results, indent=2),
            "results.md": "# Quickstart\n\n" + "\n".join(tables),
        }.items():
            with atomic_write(self.output / name) as file:
                file.write(f"{text}\n".encode())
        question = self.questions["shop"][0].instruction
        self.console.print(f"\nThe DAE student is in {self.output / 'student'}; plain transformers reads it:")
        self.console.print(f"  {question} -> {ask(self.output / 'student', question)}", highlight=False)
        self.console.print(f"Results: {self.output / 'results.md'} and {self.output / 'results.json'}")

    def show(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name.replace(" ", "\n", 1) if number else name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print("", table)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def verdict(rows: dict[str, dict[str, float]]) -> str:
    """In one sentence, whether the lowest third of LP beat the random thirds, by exact match and by loss."""
    low = rows["lowest third"]
    random_thirds = [figures for name, figures in rows.items() if name.startswith("random")]
    parts = []
    for key, name, form, sign in (("exact_match", "exact match", ".1%", 1), ("loss", "loss", ".3f", -1)):
        values = sorted(figures[key] for figures in random_thirds)
        better, worse = (low[key] > values[-1], low[key] < values[0])[::sign]
        effect = "helped" if better else "hurt" if worse else "made no difference"
        against = f"{low[key]:{form}} against {values[0]:{form}} to {values[-1]:{form}}"
        parts.append(f"{effect} by {name} ({against})")
    return f"Choosing the lowest third of LP instead of {len(random_thirds)} random ones {' and '.join(parts)}."


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int = 24
) -> list[str]:
    """Greedy answers to prompts."""
    generator = Generator(model, tokenizer, max_new_tokens=max_new_tokens)
    ids = [np.array(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    batches = (ids[start : start + 2 * BATCH_SIZE] for start in range(0, len(ids), 2 * BATCH_SIZE))
    return [response.text for batch in batches for response in generator.answer(batch)]


def ask(folder: Path, question: str) -> str:
    """What an exported model answers; nothing but transformers is used."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return answer(model, tokenizer, [str(prompt)])[0]


def _cells(*figures: dict[str, float]) -> list[str]:
    return [cell for f in figures for cell in (f"{f['loss']:.3f}", f"{f['exact_match']:.1%}")]
