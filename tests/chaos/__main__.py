"""python -m chaos: kill training runs at random moments, resume them, and compare them with runs left alone."""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from itertools import cycle
from pathlib import Path

from chaos.arms import ARMS
from chaos.chain import KILLS, Reference, kill_until_the_end
from chaos.summary import Summary
from processes import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in total, over all arms")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="arms whose names contain this")
    parser.add_argument("--output", type=Path, default=Path("build/chaos"), help="summary, and runs that went wrong")
    options = parser.parse_args()
    arms = [arm for arm in ARMS if options.only in arm.name]
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}, expected 1 or more")
    if not arms:
        parser.error(f"no arm's name contains {options.only!r}; there are {', '.join(arm.name for arm in ARMS)}")
    output = options.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is started is ended, as by Ctrl-C
    run(int)  # starts what all others are forked from, so that no run is measured with its imports
    rng = random.Random(options.seed)
    summary = Summary(arms, options.seed)
    references: dict[str, Reference] = {}
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=other_file_system(output)) as temporary:
        for number, arm in enumerate(cycle(arms)):
            left = options.kills - summary.kills
            if left <= 0:
                break
            name = "-".join("".join(c if c.isalnum() else " " for c in arm.name).split())
            if arm.name not in references:
                references[arm.name] = Reference(arm, output / name, Path(temporary) / name).make()
            folder, own = output / name / f"killed-{number}", Path(temporary) / f"{name}-{number}"
            chain = kill_until_the_end(references[arm.name], folder, own, rng, min(KILLS, left))
            print(summary.add(chain), flush=True)
            shutil.rmtree(own)
            if not chain.problems:
                shutil.rmtree(folder)
    text = summary.text()
    print(f"\n{text}")
    (output / "summary.txt").write_text(text + "\n")
    (output / "summary.json").write_text(summary.json())
    for arm in references.values():
        if not any(arm.folder.glob("killed-*")):
            shutil.rmtree(arm.folder)
    return int(summary.failed)


def other_file_system(folder: Path) -> Path | None:
    """Where a temporary file cannot simply be renamed into `folder`; None = TMPDIR, if there is no such place."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and memory.stat().st_dev != folder.stat().st_dev
    return memory if usable and shutil.disk_usage(memory).free > 2 << 30 else None


if __name__ == "__main__":
    sys.exit(main())
