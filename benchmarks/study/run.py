"""Run the study: the next unfinished arm, again and again, until the time is up. It can be stopped at any moment.

    make model
    python benchmarks/study/run.py --minutes 60

Every arm is a `lightning-itk fit`, then a `lightning-itk validate` of what it exported, on the same held-out records.
Its row is appended to `results/*.jsonl`; its results per record stay in `results/records/` for `lightning-itk compare`.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from arms import ARMS, BASE, CHARACTERS, PRUNED, RECORDS, SEEDS, Arm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Study:
    """Where a study reads and writes.

    Args:
        model: folder of the teacher, from which students are pruned.
        data: records, JSON Lines, plain or gzipped.
        work: what may be deleted: students, splits, runs.
        results: rows and results per record.
    """

    def __init__(self, model: Path, data: Path, work: Path, results: Path, sizes: dict[str, int] | None = None) -> None:
        self.model, self.data, self.work, self.results = model, data, work, results
        self.sizes = sizes or RECORDS

    def prepare(self) -> None:
        """Split the records once: train, test, and test records with three other answers beside their own."""
        done = self.work / "choice.jsonl"
        if done.exists():
            return
        self.work.mkdir(parents=True, exist_ok=True)
        with (gzip.open if self.data.suffix == ".gz" else open)(self.data, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        short = [r for r in records if sum(map(len, (v for v in r.values() if isinstance(v, str)))) <= CHARACTERS]
        test, train = short[: self.sizes["test"]], short[self.sizes["test"] :][: self.sizes["train"]]
        if len(train) < 8 or len(test) < self.sizes["choice"]:
            raise SystemExit(f"{self.data}: holds {len(short)} records of up to {CHARACTERS} characters, too few")
        rng = np.random.default_rng(0)
        choices = []
        for number in range(self.sizes["choice"]):
            others = [other for other in rng.permutation(len(test)) if other != number][:3]
            choices += [{**test[number], "response": test[other]["response"]} for other in (number, *others)]
        for name, rows in (("train", train), ("test", test), ("choice", choices)):
            temporary = self.work / f"{name}.tmp"
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            temporary.rename(self.work / f"{name}.jsonl")

    def student(self, name: str) -> Path:
        """A student's folder, pruned from the model when it is first asked for."""
        folder = self.work / f"student-{name}"
        if not folder.exists():
            layers = [
                "--layers",
                PRUNED[name],
                "--data",
                f"{self.work}/train.jsonl",
                "--limit",
                "64",
                "--max_length",
                "192",
            ]
            target = folder.with_name(f"{folder.name}.made")
            shutil.rmtree(target, ignore_errors=True)
            self.command("prune", "--model", f"{self.model}", *layers, "--output", f"{target}", "--device", "cpu")
            if name == "random":
                forget(target)
            target.rename(folder)
        return folder

    def train_file(self, records: int | None) -> Path:
        """The training records, or the first of them."""
        whole = self.work / "train.jsonl"
        if records is None:
            return whole
        part = self.work / f"train-{records}.jsonl"
        if not part.exists():
            lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)[:records]
            part.write_text("".join(lines), encoding="utf-8")
        return part

    def config(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        """What `lightning-itk fit` is told."""
        model = {**BASE["model"], **{k: v for k, v in arm.model.items() if k != "class"}}
        model["student"] = str(self.student(arm.student))
        if arm.model["class"] != "SFTModule":
            model["teacher"] = str(self.model)
        if isinstance(layers := model.get("attention"), dict) and layers.get("layers") == "formula":
            model["attention"] = {**layers, "layers": by_formula(self.student(arm.student), self.model)}
        export = {"class_path": "lightning_itk.callbacks.HFExport", "init_args": {"dirpath": f"{folder}/export"}}
        count = {"class_path": "tokens.ResponseTokens", "init_args": {"path": f"{folder}/tokens.txt"}}
        trainer = {"max_steps": arm.steps, "max_epochs": -1, "log_every_n_steps": 10, "callbacks": [export, count]}
        return {
            "seed_everything": seed,
            "model": {"class_path": f"lightning_itk.{arm.model['class']}", "init_args": model},
            "data": {**BASE["data"], "train": str(self.train_file(arm.records)), "seed": seed, **self.cache()},
            "trainer": {**BASE["trainer"], **trainer, "default_root_dir": str(folder), **csv(folder)},
        }

    def cache(self) -> dict[str, str]:
        return {"cache_dir": str(self.work / "cache")}

    def evaluation(self, student: Path, what: str, folder: Path) -> dict[str, Any]:
        """What `lightning-itk validate` is told: every arm is looked at with the same teacher beside it."""
        model: dict[str, Any] = {"student": str(student)}
        if what == "test":
            model["teacher"] = str(self.model)
        record = {"path": f"{folder}/{what}.parquet", "overwrite": True}
        trainer = {"callbacks": [{"class_path": "lightning_itk.results.RecordResults", "init_args": record}]}
        data = {**BASE["data"], "train": str(self.work / "test.jsonl"), "validation": str(self.work / f"{what}.jsonl")}
        kind = "KDModule" if what == "test" else "SFTModule"
        return {
            "model": {"class_path": f"lightning_itk.{kind}", "init_args": model},
            "data": {**data, "max_length": 512, **self.cache()},
            "trainer": {**BASE["trainer"], **trainer, "default_root_dir": str(folder), **csv(folder)},
        }

    def command(self, *args: str) -> None:
        """Run `lightning-itk`; what it says is kept beside the students."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])}
        with (self.work / "log.txt").open("a") as log:
            log.write(f"\n$ lightning-itk {' '.join(args)}\n")
            log.flush()
            done = subprocess.run([sys.executable, "-m", "lightning_itk", *args], stdout=log, stderr=log, env=env)
        if done.returncode:
            raise SystemExit(f"lightning-itk {args[0]} failed; {self.work}/log.txt says why")

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train and look at one arm with one seed; its row."""
        name = f"{arm.question}-{arm.name}-{seed}".replace(" ", "-").replace(",", "").replace("+", "and")
        folder = self.work / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.monotonic()
        self.with_config("fit", self.config(arm, seed, folder), folder)
        seconds = time.monotonic() - started
        exported = folder / "export" / "last"
        figures = self.look(exported, folder)
        kept = self.results / "records" / f"{name}.parquet"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "test.parquet", kept)
        shutil.rmtree(folder / "export")
        row = {"arm": arm.key, "seed": seed, "design": arm.design, "commit": commit(), "steps": arm.steps}
        tokens = int((folder / "tokens.txt").read_text())
        row |= {"response_tokens": tokens, "seconds": round(seconds, 1), "records": kept.name, **figures}
        return row

    def with_config(self, command: str, config: dict[str, Any], folder: Path) -> None:
        path = folder / f"{command}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.command(command, "--config", str(path))

    def look(self, student: Path, folder: Path) -> dict[str, float]:
        """The figures of a student on the held-out records."""
        from lightning_itk.evaluation.record_results import read_results

        figures = {}
        for what in ("test", "choice"):
            self.with_config("validate", self.evaluation(student, what, folder), folder)
            columns, _ = read_results(folder / f"{what}.parquet")
            if what == "test":
                share = columns["tokens"] / columns["tokens"].sum()
                for name in ("response_loss", "token_accuracy", "kl", "teacher_agreement", "teacher_response_loss"):
                    figures[name] = float(columns[name] @ share)
            else:
                loss = np.full(4 * self.sizes["choice"], np.inf)
                loss[columns["record"]] = columns["response_loss"]
                figures["choice"] = float((loss.reshape(-1, 4).argmin(1) == 0).mean())
        return figures

    def rows(self) -> list[dict[str, Any]]:
        """All rows of arms as they are designed now."""
        designs = {arm.key: arm.design for arm in ARMS}
        lines = [line for path in sorted(self.results.glob("*.jsonl")) for line in path.read_text().splitlines()]
        return [row for row in map(json.loads, lines) if designs.get(row["arm"]) == row["design"]]

    def add(self, row: dict[str, Any]) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        question = row["arm"].partition("/")[0]
        with (self.results / f"{question}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def unfinished(self, questions: list[str]) -> Iterator[tuple[Arm, int]]:
        """Arms without a row: of each question first all arms with the first seed."""
        done = {(row["arm"], row["seed"]) for row in self.rows()}
        names = list(dict.fromkeys(arm.question for arm in ARMS if not questions or arm.question in questions))
        for question in names:
            for seed in SEEDS:
                for arm in ARMS:
                    if arm.question == question and (arm.key, seed) not in done:
                        yield arm, seed


def csv(folder: Path) -> dict[str, Any]:
    logger = {"save_dir": str(folder), "name": "", "version": "log"}
    return {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}}


def by_formula(student: Path, teacher: Path) -> dict[int, int]:
    """Layers paired as for a student that was not pruned."""
    from lightning_itk.attention.capture import layer_map

    depths = [json.loads((folder / "config.json").read_text())["num_hidden_layers"] for folder in (student, teacher)]
    return layer_map(*depths)


def forget(folder: Path) -> None:
    """Give a model new random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="start no arm after this long")
    parser.add_argument("--model", type=Path, default=ROOT / "build/smollm2-135m")
    data = Path(os.environ.get("ITK_REAL_DATA", ROOT.parent / "shared/data")) / "dolly-15k.jsonl.gz"
    parser.add_argument("--data", type=Path, default=data, help="Dolly's records as JSON Lines, plain or gzipped")
    parser.add_argument("--work", type=Path, default=ROOT / "build/study")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="*", default=[], help="questions: " + ", ".join({a.question: 0 for a in ARMS}))
    given = parser.parse_args()
    for path, how in ((given.model, "`make model` writes it"), (given.data, "--data names a copy")):
        if not path.exists():
            raise SystemExit(f"{path}: is not there; {how}")
    study = Study(given.model, given.data, given.work, given.results)
    study.prepare()
    end = time.monotonic() + 60 * given.minutes
    for arm, seed in study.unfinished(given.only):
        if time.monotonic() > end:
            break
        print(f"{arm.key}, seed {seed}", flush=True)
        row = study.run(arm, seed)
        study.add(row)
        print("  " + ", ".join(f"{k} {row[k]:.3f}" for k in ("response_loss", "kl", "teacher_agreement", "choice")))


if __name__ == "__main__":
    main()
