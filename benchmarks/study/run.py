"""Run the study: the next unfinished arm, again and again, until the time is up. It can be stopped at any moment.

    make model
    python benchmarks/study/run.py --minutes 60

Every arm is a `lightning-itk fit`, then a `lightning-itk validate` of what it exported, on the same held-out records.
Its row is appended to `results/*.jsonl`; its results per record stay in `results/records/` for `lightning-itk compare`.
"""

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, BASE, RECORDS, SEEDS, Arm
from materials import ROOT, Materials, add_arguments


class Study:
    """Runs arms, and keeps what is known of them.

    Args:
        materials: what arms are made of.
        results: where rows and results per record stay.
    """

    def __init__(self, materials: Materials, results: Path) -> None:
        self.materials, self.results = materials, results

    def config(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        """What `lightning-itk fit` is told."""
        made, teacher = self.materials, str(self.materials.model)
        model = {**BASE["model"], **{k: v for k, v in arm.model.items() if k != "class"}}
        model["student"] = str(made.student(arm.student))
        if arm.model["class"] == "KDModule":
            model["teacher"] = teacher
        if arm.model["class"] == "DAEModule":
            model["teachers"] = {"reference": teacher, "expert": str(made.expert())}
        if isinstance(layers := model.get("attention"), dict) and layers.get("layers") == "formula":
            model["attention"] = {**layers, "layers": by_formula(made.student(arm.student), made.model)}
        export = {"class_path": "lightning_itk.callbacks.HFExport", "init_args": {"dirpath": f"{folder}/export"}}
        count = {"class_path": "tokens.ResponseTokens", "init_args": {"path": f"{folder}/tokens.txt"}}
        steps = self.steps(arm, seed)
        trainer = {"max_steps": steps, "max_epochs": -1, "log_every_n_steps": 10, "callbacks": [export, count]}
        data = {**BASE["data"], "train": made.train(arm.data, arm.records, seed), "seed": seed, **self.cache()}
        return {
            "seed_everything": seed,
            "model": {"class_path": f"lightning_itk.{arm.model['class']}", "init_args": model},
            "data": data,
            "trainer": {**BASE["trainer"], **trainer, "default_root_dir": str(folder), **csv(folder)},
        }

    def steps(self, arm: Arm, seed: int) -> int:
        """Optimizer steps of an arm, so many that its response tokens are those of other data where it says so."""
        if arm.tokens_of is None:
            return arm.steps
        tokens = self.materials.response_tokens
        return max(1, round(arm.steps * tokens(arm.tokens_of, seed) / tokens(arm.data, seed)))

    def cache(self) -> dict[str, str]:
        return {"cache_dir": str(self.materials.work / "cache")}

    def evaluation(self, student: Path, file: Path, folder: Path) -> dict[str, Any]:
        """What `lightning-itk validate` is told: every arm is looked at with the same teacher beside it."""
        what, model = file.stem, {"student": str(student), "max_new_tokens": 24}
        if what == "test":
            model["teacher"] = str(self.materials.model)
        record = {"path": f"{folder}/{what}.parquet", "overwrite": True, "exact_match": what == "shop-test"}
        trainer = {"callbacks": [{"class_path": "lightning_itk.results.RecordResults", "init_args": record}]}
        data = {**BASE["data"], "train": str(self.materials.work / "test.jsonl"), "validation": str(file)}
        kind = "KDModule" if what == "test" else "SFTModule"
        return {
            "model": {"class_path": f"lightning_itk.{kind}", "init_args": model},
            "data": {**data, "max_length": 512, **self.cache()},
            "trainer": {**BASE["trainer"], **trainer, "default_root_dir": str(folder), **csv(folder)},
        }

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train and look at one arm with one seed; its row."""
        name = f"{arm.question}-{arm.name}-{seed}".replace(" ", "-").replace(",", "").replace("+", "and")
        name = name.replace("%", "percent")
        folder = self.materials.work / "runs" / name
        config = self.config(arm, seed, folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.monotonic()
        self.materials.with_config("fit", config, folder)
        seconds = time.monotonic() - started
        figures = self.look(arm, folder / "export" / "last", folder)
        kept = self.results / "records"
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "test.parquet", kept / f"{name}.parquet")
        row = {"arm": arm.key, "seed": seed, "design": arm.design, "commit": commit()}
        row |= {"steps": config["trainer"]["max_steps"], "response_tokens": int((folder / "tokens.txt").read_text())}
        row |= {"seconds": round(seconds, 1), "records": f"{name}.parquet"}
        if (folder / "shop-test.parquet").exists():
            shutil.copy(folder / "shop-test.parquet", kept / f"{name}-shop.parquet")
            row["shop_records"] = f"{name}-shop.parquet"
        shutil.rmtree(folder / "export")
        return row | figures

    def look(self, arm: Arm, student: Path, folder: Path) -> dict[str, float]:
        """The figures of a student on the held-out records."""
        from lightning_itk.evaluation.record_results import read_results

        figures, work = {}, self.materials.work
        files = [work / "test.jsonl", work / "choice.jsonl"]
        files += [self.materials.shop_test()] if arm.question == "dae" else []
        for file in files:
            self.materials.with_config("validate", self.evaluation(student, file, folder), folder)
            columns, _ = read_results(folder / f"{file.stem}.parquet")
            share = columns["tokens"] / columns["tokens"].sum()
            if file.stem == "test":
                for name in ("response_loss", "token_accuracy", "kl", "teacher_agreement", "teacher_response_loss"):
                    figures[name] = float(columns[name] @ share)
            elif file.stem == "choice":
                loss = np.full(4 * self.materials.records["choice"], np.inf)
                loss[columns["record"]] = columns["response_loss"]
                figures["choice"] = float((loss.reshape(-1, 4).argmin(1) == 0).mean())
            else:
                figures["shop_response_loss"] = float(columns["response_loss"] @ share)
                figures["shop_exact_match"] = float(columns["exact_match"].mean())
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


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="start no arm after this long")
    parser.add_argument("--only", nargs="*", default=[], help="questions: " + ", ".join({a.question: 0 for a in ARMS}))
    given = add_arguments(parser).parse_args()
    for path, how in ((given.model, "`make model` writes it"), (given.data, "--data names a copy")):
        if not path.exists():
            raise SystemExit(f"{path}: is not there; {how}")
    study = Study(Materials(given.model, given.data, given.work, RECORDS), given.results)
    study.materials.prepare()
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
