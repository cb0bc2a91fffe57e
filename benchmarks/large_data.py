"""The data path at size, through the command line: tokenize in shards, train on several ranks, start again, resume.

    python benchmarks/large_data.py --records 10_000_000      3 GB of disk, 25 minutes of processor time
    python benchmarks/large_data.py --tiny                    every line of code once, in this process

Records are made up, and short; the model is tiny. One JSON line per step: seconds and processor seconds of all its
processes, the most private (anonymous) memory that a rank held and what of it came after the imports, its file pages,
and the processor seconds of `prepare_data`, `setup` and the plan of an epoch on the rank that needed most.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback

HERE = Path(__file__).parent
_WORDS = 3 * ["red", "blue", "old", "new", "small", "large", "sun", "tree", "house", "river", "stone", "bird"]
_WRITTEN = 100_000  # records at a time
_NOTES = "LARGE_DATA_NOTES"  # file that the ranks of a run write to
MAX_LENGTH = 64


def write_records(folder: Path, count: int, files: int = 10) -> None:
    """JSON Lines files of prompts with answers of 1 to 16 words."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(files):
        first, end = number * count // files, (number + 1) * count // files
        with (folder / f"{number:04}.jsonl").open("w") as file:
            for start in range(first, end, _WRITTEN):
                numbers = range(start, min(start + _WRITTEN, end))
                sizes = rng.geometric(0.25, len(numbers)).clip(1, 16).tolist()
                begins = rng.integers(0, 12, len(numbers)).tolist()
                for i, size, begin in zip(numbers, sizes, begins, strict=True):
                    answer = " ".join(_WORDS[begin : begin + size])
                    file.write(f'{{"prompt": "say {i}", "completion": "{answer}"}}\n')


def memory_mib(pid: int | str) -> tuple[int, int]:
    """Private and file-backed resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return kib["RssAnon"] >> 10, (kib["RssFile"] + kib["RssShmem"]) >> 10


class Probe(Callback):
    """Notes what the data module and the sampler of this rank need, and which samples the first steps see."""

    def __init__(self) -> None:
        from lightning_itk.data.module import InstructionDataModule
        from lightning_itk.data.sampler import BatchSampler

        self.found: dict[str, Any] = {"rank": int(os.environ.get("LOCAL_RANK", 0)), "steps": []}
        self.before, self.peak, self.done = memory_mib("self")[0], 0, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()
        self.patched: list[tuple[Any, str, Any]] = []
        for name in ("prepare_data", "setup"):
            self._time(InstructionDataModule, name, name)
        self._time(BatchSampler, "_make_plan", "plan")

    def _look(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, memory_mib("self")[0])

    def _time(self, owner: Any, name: str, key: str) -> None:
        action: Callable[..., Any] = getattr(owner, name)

        @wraps(action)
        def timed(*args: Any, **options: Any) -> Any:
            wall, own = time.perf_counter(), time.process_time()
            try:
                return action(*args, **options)
            finally:
                for clock, start, now in (("s", wall, time.perf_counter()), ("cpu_s", own, time.process_time())):
                    self.found[f"{key}_{clock}"] = max(self.found.get(f"{key}_{clock}", 0), now - start)

        self.patched.append((owner, name, action))
        setattr(owner, name, timed)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.found["steps"].append([batch_idx, sorted(set(batch["sample_ids"].flatten().tolist()) - {-1})])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.done.set()
        for patch in self.patched:
            setattr(*patch)
        private, file = memory_mib("self")
        self.found |= {"private_mib": max(self.peak, private), "file_mib": file, "pss_mib": _pss_mib()}
        self.found |= {"grown_mib": self.found["private_mib"] - self.before, "kept_mib": private - self.before}
        with Path(os.environ[_NOTES]).open("a") as notes:
            notes.write(json.dumps(self.found) + "\n")


def _pss_mib() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) >> 10


class Bench:
    """One size, in a folder of its own."""

    def __init__(self, folder: Path, records: int, ranks: int, tiny: bool = False) -> None:
        self.folder, self.records, self.ranks, self.tiny = folder, records, ranks, tiny
        self.rows: list[dict[str, Any]] = []
        from lightning_itk.toy.world import make_student, make_tokenizer

        tokenizer = make_tokenizer()
        make_student(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_records(folder / "records", records)

    def run(self, step: str, *commands: list[str]) -> list[dict[str, Any]]:
        """Commands of `lightning-itk`, side by side, as one row; returns what its ranks noted."""
        notes = self.folder / f"{len(self.rows)}.notes"
        common = ["--data.train", f"{self.folder}/records", "--data.cache_dir", f"{self.folder}/cache"]
        common += ["--data.max_length", str(MAX_LENGTH), "--data.num_proc", "1"]
        common += ["--model", "lightning_itk.SFTModule", "--model.student", f"{self.folder}/model"]
        start, before = time.perf_counter(), _cpu_s()
        self._start([[name, *common, *rest] for name, *rest in commands], notes)
        row: dict[str, Any] = {"step": step, "records": self.records, "s": time.perf_counter() - start}
        row["cpu_s"] = _cpu_s() - before
        ranks = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        for name in sorted({name for rank in ranks for name in rank} - {"rank", "steps"}):
            row[name] = max(rank.get(name, 0) for rank in ranks)
        self.rows.append({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
        print(json.dumps(self.rows[-1]), flush=True)
        return ranks

    def _start(self, commands: list[list[str]], notes: Path) -> None:
        os.environ |= {_NOTES: str(notes), "OMP_NUM_THREADS": "1"}
        if self.tiny:
            from lightning_itk import cli

            if any(cli.main(command) for command in commands):
                raise SystemExit(1)
            return
        paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        started = []
        for number, command in enumerate(commands):
            with notes.with_suffix(f".{number}.log").open("w") as log:
                whole = [sys.executable, "-m", "lightning_itk", *command]
                started.append((subprocess.Popen(whole, env=env, stdout=log, stderr=log, cwd=self.folder), log.name))
        for process, path in started:
            if process.wait():
                raise SystemExit(f"{commands[0][0]} failed:\n{Path(path).read_text()[-2000:]}")

    def fit(self, step: str, *options: str, save: bool = False) -> dict[tuple[int, int], list[int]]:
        """A few steps of training; returns which samples each micro-batch of each rank had."""
        callbacks: list[dict[str, Any]] = [{"class_path": "large_data.Probe"}]
        if save:
            where = {
                "dirpath": f"{self.folder}/saved",
                "filename": "{step}",
                "every_n_train_steps": 2,
                "save_top_k": -1,
            }
            callbacks += [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": where}]
        trainer = {"accelerator": "cpu", "devices": self.ranks, "max_steps": 4, "logger": "false"}
        trainer |= {"strategy": "ddp" if self.ranks > 1 else "auto", "enable_checkpointing": str(save).lower()}
        trainer |= {"enable_progress_bar": "false", "callbacks": json.dumps(callbacks)}
        trainer["default_root_dir"] = str(self.folder)  # fit leaves its configuration there
        given = [part for name, value in trainer.items() for part in (f"--trainer.{name}", str(value))]
        ranks = self.run(step, ["fit", *given, *options])
        return {(rank["rank"], batch): samples for rank in ranks for batch, samples in rank["steps"]}

    def whole(self) -> None:
        """All steps."""
        share = ["--data.validation", "0"]
        self.run("tokenize", *(["tokenize", *share, "--shard", f"{number}/2"] for number in range(2)))
        size = sum(path.stat().st_size for path in (self.folder / "cache").rglob("*") if path.is_file())
        print(json.dumps({"records_mib": _mib(self.folder / "records"), "cache_mib": size >> 20}), flush=True)
        seen = self.fit("fit padded, first start", *share, save=True)
        (saved,) = (self.folder / "saved").glob("step=2*.ckpt")
        again = self.fit("fit padded, resumed in mid-epoch", *share, "--ckpt_path", str(saved))
        if not again or again != {at: seen[at] for at in again}:
            raise SystemExit("the resumed run saw other samples")
        self.fit("fit packed", *share, "--data.packing", "true")
        self._write_scores()
        chosen = ["--data.validation", "0.02", "--data.subset.fraction", "0.3", "--trainer.limit_val_batches", "1"]
        chosen += ["--data.subset.scores", f"{self.folder}/scores.parquet"]
        self.fit("fit a subset, a share held out", *chosen)
        self.fit("the same, second start", *chosen)

    def _write_scores(self) -> None:
        from lightning_itk.data.records import joint_fingerprint
        from lightning_itk.data.samples import Summary
        from lightning_itk.selection.scores import write_scores

        (path,) = (self.folder / "cache").glob("*/summary.json")
        rng = np.random.default_rng(0)
        before = rng.normal(3, 0.5, self.records).astype(np.float32)
        losses = np.stack([before, before - rng.random(self.records, np.float32)])
        meta = {"fingerprint": joint_fingerprint([Summary.from_json(path.read_text()).fingerprint])}
        tokens = np.full(self.records, 9)
        write_scores(self.folder / "scores.parquet", np.arange(self.records), tokens, losses, meta)


def _cpu_s() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _mib(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) >> 20


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a few hundred records on one rank")
    parser.add_argument(
        "--folder", type=Path, help="where the files go; default: a temporary folder. Removed at the end"
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="large-data-", dir=options.folder))
    try:
        bench = Bench(folder, 300, 1, tiny=True) if options.tiny else Bench(folder, options.records, options.ranks)
        bench.whole()
    finally:
        shutil.rmtree(folder)
    return bench.rows


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not
    main()
