"""`make fuzz`: all kinds in turn for some minutes, then Triton's interpreter; figures; exit code 1 on a failure."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from fuzz.engine import Figures, batch, run
from fuzz.kinds import KINDS

SLICE = 30.0
"""Seconds of one kind before the next has its turn."""


def main() -> int:
    """Parse the arguments, run, and say what came of it."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("ITK_FUZZ_SEED") or time.time()))
    parser.add_argument(
        "--case", default=os.environ.get("ITK_FUZZ_CASE", ""), help="kind:number or kind:text of a failure"
    )
    parser.add_argument("--kinds", default="", help="some of them, with commas; the default is all")
    parser.add_argument("--output", default="", help="JSON file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case:
        return _again(given.case)
    names = [name for name in given.kinds.split(",") if name] or [*KINDS, "triton"]
    if unknown := [name for name in names if name not in (*KINDS, "triton")]:
        parser.error(f"unknown kind {unknown[0]!r}, there are {', '.join([*KINDS, 'triton'])}")
    figures = {name: Figures(name, given.seed * 1_000_000) for name in names if name in KINDS}
    seconds = 60 * given.minutes
    print(f"seed {given.seed}, {given.minutes:g} minutes, {', '.join(names)}", flush=True)
    plain: list[dict[str, object]] = []
    try:
        end = time.monotonic() + seconds * len(figures) / len(names)
        while figures and time.monotonic() < end:
            for name in figures:
                known = set(figures[name].failures)
                run(KINDS[name], figures[name], min(SLICE, end - time.monotonic(), seconds / len(names)))
                for where in set(figures[name].failures) - known:
                    print(figures[name].told(where), flush=True)
        if "triton" in names and "triton" not in figures:
            plain += _in_the_interpreter(seconds / len(names), given.seed)
    except KeyboardInterrupt:
        print("interrupted")
    print("\n".join(map(str, figures.values())))
    plain += [found.plain() for found in figures.values()]
    if given.output:
        Path(given.output).write_text(json.dumps(plain, indent=1) + "\n")
    return int(any(found["failures"] for found in plain))


def _again(case: str) -> int:
    """One batch, or the shrunk case of a failure."""
    name, _, rest = case.partition(":")
    if name == "triton" and name not in KINDS:
        return subprocess.call(
            [sys.executable, "-m", "fuzz", "--case", case], env=os.environ | {"TRITON_INTERPRET": "1"}
        )
    figures = Figures(name, 0)
    number = int(rest) if rest.isdigit() else 0
    batch(KINDS[name], number, figures, text="" if rest.isdigit() else rest)
    print(figures)
    return int(bool(figures.failures))


def _in_the_interpreter(seconds: float, seed: int) -> list[dict[str, object]]:
    """The figures of a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    path = Path(tempfile.gettempdir(), f"itk-fuzz-triton-{os.getpid()}.json")
    options = ["--kinds", "triton", "--minutes", str(seconds / 60), "--seed", str(seed), "--output", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "ITK_FUZZ_CASE": "", "PYTHONWARNINGS": "ignore"}
    code = subprocess.call([sys.executable, "-X", "faulthandler", "-m", "fuzz", *options], env=environment)
    if not path.exists():
        return [{"kind": "triton", "failures": [f"exit code {code}, no figures"]}]
    found = json.loads(path.read_text())
    path.unlink()
    return found


if __name__ == "__main__":
    sys.exit(main())
