"""Run the benchmarks and write one JSON line per result.

    python benchmarks/run.py --cpu      what a CPU can say (minutes)
    python benchmarks/run.py --full     everything, on a GPU, inside --budget seconds
    python benchmarks/run.py --tiny     every line of code once, no meaning in the numbers (seconds)

Subjects run in order of importance; each may use its share of what is left of the budget, and what does not fit becomes
a row that says "skipped".
"""

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from machine import PEERS, describe, device_works, version
from settings import Settings, failures_as_rows

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, installed or not

SUBJECTS = {  # name -> weight in the budget, in order of importance
    "accuracy": 5,
    "linear_kl": 5,
    "attention_kl": 5,
    "training_step": 8,
    "whole_step": 12,
    "linear_ce": 2,
    "kl_logits": 2,
    "limits": 2,
    "data_path": 2,
}
RESULTS = Path(__file__).parent / "results"


def show(row: dict) -> None:
    """One line per result on the terminal."""
    shape = "x".join(str(v) for v in row["shape"].values() if v is not None) if row.get("shape") else ""
    parts = [f"{row['subject']:20} {shape[:44]:44} {row['provider'][:34]:34} {row.get('mode', '')[:16]:16}"]
    if row["status"] != "ok":
        parts.append(f"{row['status']}: {row.get('reason', '')[:80]}")
    for name, form in (
        ("ms", "{:9.2f} ms"),
        ("memory_mib", "{:8.1f} MiB"),
        ("percent_of_floor", "{:5.1f} % of floor"),
        ("gradient_error", "gradient error {:.1e}"),
        ("kl", "at {:.1e}"),
        ("rate", "{:.3g}"),
        ("unit", "{}"),
        ("largest", "{}"),
        ("stopped", "until {}"),
    ):
        if row["status"] == "ok" and row.get(name) is not None:
            parts.append(form.format(row[name]))
    print(" ".join(parts), flush=True)


def run_subjects(wanted: list[str], settings: Settings, deadline: float) -> list[str]:
    """Run subjects, each in its share of the time; returns those that this process cannot run any more."""
    for number, subject in enumerate(wanted):
        weights = [SUBJECTS[later] for later in wanted[number:]]
        left = deadline - time.monotonic()
        settings.deadline = time.monotonic() + left * weights[0] / sum(weights)
        with failures_as_rows(settings, {"subject": subject, "provider": "all", "mode": "*", "shape": {}}):
            importlib.import_module(subject).run(settings)
        if not device_works(settings.device):  # an illegal access: nothing here reaches the device any more
            return wanted[number + 1 :]
    return []


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all shapes, on a GPU")
    size.add_argument("--cpu", action="store_true", help="what a CPU can say")
    size.add_argument("--tiny", action="store_true", help="every line of code once")
    parser.add_argument("--budget", type=float, help="seconds in all (default: 420 with --full, 1200 with --cpu)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="subjects; rows of others are kept"
    )
    parser.add_argument("--model", metavar="FOLDER", help="whole_step's model; 'whole': a random one of its full shape")
    parser.add_argument("--student", metavar="FOLDER", help="whole_step's student; default: two thirds of its layers")
    parser.add_argument("--data", metavar="FILE", help="records for the model of --model; default: random tokens")
    options = parser.parse_args(arguments)
    if options.model not in (None, "whole") and not Path(options.model, "config.json").is_file():
        parser.error(f"--model {options.model}: there is no config.json in it")
    if (options.data or options.student) and options.model in (None, "whole"):
        parser.error("--student and --data belong to a model: give --model FOLDER")
    if options.full and not torch.cuda.is_available():
        parser.exit(1, "run.py: --full needs a GPU that torch can use; --cpu runs what a CPU can say\n")
    device = "cuda" if options.full else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # one thread's processor time can be compared on a machine that others use
    budget = options.budget or (420 if options.full else 1200)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    absent = [peer for peer in PEERS if version(peer) is None]
    if absent:
        print(f"run.py: not installed, so without numbers: {', '.join(absent)}", file=sys.stderr)

    options.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", describe(device)["device"].lower()).strip("-")
    kind = "tiny" if options.tiny else device
    if options.model:  # beside the rows of the model that a run without it takes
        kind += f"-{Path(options.model).name}"
    path = options.output / f"{datetime.date.today()}-{name}-{kind}.jsonl"
    start = time.monotonic()
    kept = []
    if path.exists():  # --only repeats a part of an earlier run of the day
        kept = [
            line for line in path.read_text().splitlines() if json.loads(line)["subject"].split()[0] not in options.only
        ]
    with path.open("w") as file:
        file.writelines(f"{line}\n" for line in kept)

        def emit(row: dict) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            show(row)

        whole = {name: getattr(options, name) for name in ("model", "student", "data")}
        settings = Settings(device=device, tiny=options.tiny, emit=emit, **whole)
        if options.tiny:
            settings.samples, settings.warmup = 1, 0
        wanted = [subject for subject in SUBJECTS if subject in options.only]
        rest = run_subjects(wanted, settings, start + budget)
    if rest:
        print("run.py: an error broke the device's context; a new process does the rest", file=sys.stderr)
        again = [sys.executable, __file__, "--full", "--output", str(options.output)]
        left = str(budget - (time.monotonic() - start))
        subprocess.run([*again, "--budget", left, "--only", *rest], check=True)
    print(f"{path}: {len(settings.rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return path


if __name__ == "__main__":
    main()
