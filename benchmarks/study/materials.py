"""What arms are made of: splits, students, an expert, scores, subsets, answers; each made when first asked for."""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from arms import BASE, CHARACTERS, EXPERT, PRUNED, SCORING, SIZES
from shop import shop_records

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Source = dict[str, str]


class Materials:
    """Files in a folder that may be deleted.

    Args:
        model: folder of the teacher, from which students are pruned.
        data: records, JSON Lines, plain or gzipped.
        work: where they are made.
        records: how many of the data are "train", "test" and "choice".
        sizes: see `arms.SIZES`.
    """

    def __init__(
        self, model: Path, data: Path, work: Path, records: dict[str, int], sizes: dict[str, int] | None = None
    ) -> None:
        self.model, self.data, self.work, self.records, self.sizes = model, data, work, records, sizes or SIZES

    def prepare(self) -> None:
        """Split the records once: train, test, and test records with three other answers beside their own."""
        done = self.work / "choice.jsonl"
        if done.exists():
            return
        self.work.mkdir(parents=True, exist_ok=True)
        with (gzip.open if self.data.suffix == ".gz" else open)(self.data, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        short = [r for r in records if sum(map(len, (v for v in r.values() if isinstance(v, str)))) <= CHARACTERS]
        test, train = short[: self.records["test"]], short[self.records["test"] :][: self.records["train"]]
        if len(train) < 8 or len(test) < self.records["choice"]:
            raise SystemExit(f"{self.data}: holds {len(short)} records of up to {CHARACTERS} characters, too few")
        rng = np.random.default_rng(0)
        choices = []
        for number in range(self.records["choice"]):
            others = [other for other in rng.permutation(len(test)) if other != number][:3]
            choices += [{**test[number], "response": test[other]["response"]} for other in (number, *others)]
        for name, rows in (("train", train), ("test", test), ("choice", choices)):
            self._write(self.work / f"{name}.jsonl", rows)

    def student(self, name: str) -> Path:
        """A student's folder, pruned from the model; "whole" is the model itself."""
        if name == "whole":
            return self.model
        folder = self.work / f"student-{name}"
        if not folder.exists():
            target = self._unfinished(folder)
            calibration = ["--data", f"{self.work}/train.jsonl", "--limit", "64", "--max_length", "192"]
            layers = ["--layers", PRUNED[name], *calibration]
            self.command("prune", "--model", f"{self.model}", *layers, "--output", f"{target}", "--device", "cpu")
            if name == "random":
                _forget(target)
            target.rename(folder)
        return folder

    def expert(self) -> Path:
        """The model, trained on the shop."""
        folder = self.work / "expert"
        if not folder.exists():
            run = self._unfinished(folder)
            data = self._shop("expert", EXPERT["records"])
            export = {"class_path": "lightning_itk.callbacks.HFExport", "init_args": {"dirpath": f"{run}/export"}}
            trainer = {"max_steps": EXPERT["steps"], "max_epochs": -1, "callbacks": [export]}
            self.with_config("fit", self._plain_run(run, data, EXPERT["lr"], self.model, trainer), run)
            (run / "export" / "last").rename(folder)
            shutil.rmtree(run)
        return folder

    def train(self, name: str, records: int | None, seed: int) -> str | list[Source]:
        """The training data of an arm, as `data.train` takes them.

        Args:
            name: train; shop-10 and shop-50, the shop's share in percent; random, longest, shortest, and lp-BY-THIRD,
                thirds of the pool; car-SOURCE, the same prompts with a source's answers.
            records: of "train", how many, the first; None = all.
            seed: of random.
        """
        whole, (kind, _, rest) = self.work / "train.jsonl", name.partition("-")
        if kind == "train":
            return str(whole if records is None else self._first(f"train-{records}", records))
        if kind == "shop":
            in_shop = self.sizes["mixture"] * int(rest) // 100
            general = self._first(f"general-{rest}", self.sizes["mixture"] - in_shop)
            return [{"path": str(general)}, {"path": str(self._shop(name, in_shop)), "teacher": "expert"}]
        if kind == "car":
            return str(self.answers(rest))
        by, _, order = rest.rpartition("-")
        return str(self.subset(name, by, order, seed))

    def shop_test(self) -> Path:
        return self._shop("test", self.sizes["shop_test"])

    def pool(self) -> Path:
        """The records that are scored."""
        return self._first("pool", self.sizes["pool"])

    def scores(self, by: str) -> Path:
        """Response losses of the pool before and after an epoch of training on it."""
        path = self.work / f"scores-{by.replace(' ', '-')}.parquet"
        if not path.exists():
            run = self._unfinished(path)
            recorder = {"path": f"{run}/scores.parquet"}
            callback = {"class_path": "lightning_itk.recorder.ResponseLossRecorder", "init_args": recorder}
            trainer = {"max_epochs": SCORING["epochs"], "limit_val_batches": 0, "callbacks": [callback]}
            student = self.student("whole" if by == "135M" else "21")
            self.with_config("fit", self._plain_run(run, self.pool(), SCORING["lr"], student, trainer), run)
            (run / "scores.parquet").rename(path)
            shutil.rmtree(run)
        return path

    def subset(self, name: str, by: str, order: str, seed: int) -> Path:
        """A third of the pool."""
        metric = {"random": "random", "longest": "length", "shortest": "length"}.get(name, "lp_app")
        order = {"longest": "highest", "shortest": "lowest", "random": "random"}.get(name, order)
        path = self.work / f"{name.replace(' ', '-')}{f'-{seed}' if name == 'random' else ''}.jsonl"
        if not path.exists():
            target = path.with_name(f"made-{path.name}")
            scores = ["--scores", f"{self.scores(by or '135M')}", "--data", f"{self.pool()}", "--fraction", f"{1 / 3}"]
            chosen = ["--metric", metric, "--order", order, "--seed", f"{seed}"]
            self.command("select", *scores, *chosen, "--output", f"{target}", "--overwrite", "true")
            target.rename(path)
        return path

    def answers(self, source: str) -> Path:
        """A source's answers to the prompts; the humans' are there already."""
        prompts = self._first("prompts", self.sizes["prompts"])
        path = prompts if source == "human" else self.work / f"answers-{source}.jsonl"
        if not path.exists():  # `generate` goes on where it was stopped, and its file appears complete
            model = self.student("21" if source == "pruned" else "whole")
            how = ["--temperature", "1" if source == "drawn" else "0", "--max_new_tokens", "96", "--batch_size", "16"]
            asked = ["--model", f"{model}", "--prompts", f"{prompts}", "--output", f"{path}", "--device", "cpu"]
            self.command("generate", *asked, *how)
        return path

    def response_tokens(self, name: str, seed: int) -> float:
        """Response tokens of a record, on average, in a third of the pool."""
        from lightning_itk.selection.scores import read_scores

        scores = read_scores(self.scores("135M"))
        pool, chosen = (_contents(Path(str(path))) for path in (self.pool(), self.train(name, None, seed)))
        tokens = {pool[record]: count for record, count in zip(scores.record, scores.tokens, strict=True)}
        return float(np.mean([tokens[content] for content in chosen]))

    def with_config(self, command: str, config: dict[str, Any], folder: Path) -> None:
        """Run a command with a configuration that is kept in the folder."""
        path = folder / f"{command}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.command(command, "--config", str(path))

    def command(self, *args: str) -> None:
        """Run `lightning-itk`; what it says is kept beside the students."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])}
        with (self.work / "log.txt").open("a") as log:
            log.write(f"\n$ lightning-itk {' '.join(args)}\n")
            log.flush()
            done = subprocess.run([sys.executable, "-m", "lightning_itk", *args], stdout=log, stderr=log, env=env)
        if done.returncode:
            raise SystemExit(f"lightning-itk {args[0]} failed; {self.work}/log.txt says why")

    def _plain_run(self, run: Path, data: Path, lr: float, student: Path, trainer: dict[str, Any]) -> dict[str, Any]:
        """SFT beside the arms: of the expert, and of what scores the pool."""
        run.mkdir(parents=True)
        optimizer = {"class_path": BASE["model"]["optimizer"]["class_path"], "init_args": {"lr": lr}}
        init = {**BASE["model"], "optimizer": optimizer, "student": str(student)}
        return {
            "seed_everything": 0,
            "model": {"class_path": "lightning_itk.SFTModule", "init_args": init},
            "data": {**BASE["data"], "train": str(data), "cache_dir": str(self.work / "cache")},
            "trainer": {**BASE["trainer"], **trainer, "default_root_dir": str(run), "logger": False},
        }

    def _shop(self, name: str, count: int) -> Path:
        path = self.work / f"shop-{name.removeprefix('shop-')}.jsonl"
        if not path.exists():
            self._write(path, shop_records(count, seed=sum(name.encode())))
        return path

    def _first(self, name: str, count: int) -> Path:
        path = self.work / f"{name}.jsonl"
        if not path.exists():
            lines = (self.work / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            self._write(path, [json.loads(line) for line in lines])
        return path

    def _unfinished(self, path: Path) -> Path:
        target = path.with_name(f"{path.name}.made")
        shutil.rmtree(target, ignore_errors=True)
        return target

    @staticmethod
    def _write(path: Path, rows: list[dict[str, Any]]) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        temporary.rename(path)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Where the study reads and writes."""
    parser.add_argument("--model", type=Path, default=ROOT / "build/smollm2-135m")
    data = Path(os.environ.get("ITK_REAL_DATA", ROOT.parent / "shared/data")) / "dolly-15k.jsonl.gz"
    parser.add_argument("--data", type=Path, default=data, help="Dolly's records as JSON Lines, plain or gzipped")
    parser.add_argument("--work", type=Path, default=ROOT / "build/study")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser


def _contents(path: Path) -> list[str]:
    return [json.dumps(json.loads(line), sort_keys=True) for line in path.read_text(encoding="utf-8").splitlines()]


def _forget(model: Path) -> None:
    """Give a model new random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
