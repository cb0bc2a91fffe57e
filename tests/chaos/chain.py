"""A run that is killed again and again until it comes to its end, beside one that is left alone."""

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from chaos.arms import Arm
from chaos.attempt import Attempt, Kill
from chaos.compare import differences
from chaos.remains import leftovers, unusable

KILLS = 4  # of one chain: then it may come to its end
_REFUSED = 3  # times that a chain goes on without the checkpoint that could not be read


@dataclass
class Reference:
    """An arm's run that nobody kills: what the others must come to, and how long it takes."""

    arm: Arm
    folder: Path
    temporary: Path
    config: Path = field(init=False)
    seconds: float = 0.0
    lasts: dict[str, float] = field(default_factory=dict)  # phase -> mean seconds of one
    times: dict[str, int] = field(default_factory=dict)  # phase -> how often it came

    def make(self) -> "Reference":
        """Write the arm's files and train.

        Raises:
            RuntimeError: the run does not come to its end.
        """
        self.config = self.arm.write(self.folder)
        whole = self.folder / "whole"
        whole.mkdir()
        attempt = Attempt(self.arm, self.config, whole, 0, self.temporary)
        outcome = attempt.run()
        if outcome.error:
            raise RuntimeError(f"{self.arm.name}: fails without any kill: {outcome.error}")
        self.seconds = outcome.seconds
        phases = attempt.phases()
        for (phase, begun), (_, ended) in zip(phases, phases[1:], strict=False):
            self.times[phase] = self.times.get(phase, 0) + 1
            self.lasts[phase] = self.lasts.get(phase, 0) + ended - begun
        self.lasts = {phase: seconds / self.times[phase] for phase, seconds in self.lasts.items()}
        shutil.rmtree(whole / "runs")
        return self


@dataclass
class Chain:
    """What became of one killed run.

    Args:
        kills: the phase of each kill.
        survivors: what became of the ranks that were left where one was killed first.
        resumes: how many times it went on from a checkpoint.
        unusable: files that had a checkpoint's name after a kill and were none.
        problems: resumes that failed, and all that is different from the reference at the end.
        left: temporary files left at the end, with their bytes.
        seconds: all of it.
    """

    arm: str
    kills: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    resumes: int = 0
    unusable: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def kill_until_the_end(reference: Reference, folder: Path, temporary: Path, rng: random.Random, most: int) -> Chain:
    """Run an arm in a new folder, kill it up to `most` times, let it end and compare."""
    arm, start = reference.arm, time.time()
    chain = Chain(arm.name)
    folder.mkdir(parents=True)
    refused = number = 0
    while True:
        attempt = Attempt(arm, reference.config, folder, number, temporary)
        number += 1
        kill = moment(reference, rng, fresh=not attempt.resumes) if len(chain.kills) < most else None
        outcome = attempt.run(kill)
        chain.resumes += attempt.resumes
        if outcome.killed is not None:
            chain.kills.append(outcome.killed)
            chain.survivors += [outcome.survivors] if outcome.survivors else []
            new = [path for path in map(str, unusable(folder)) if not any(path in known for known in chain.unusable)]
            chain.unusable += [f"{path} after a kill in phase {outcome.killed}" for path in new]
        elif outcome.error:
            chain.problems.append(outcome.error)
            broken = unusable(folder)
            refused += 1
            if not broken or refused > _REFUSED:
                break
            for path in broken:  # as a user would who reads the error; the chain is counted as different anyway
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            break
    chain.problems += differences(reference.folder / "whole", folder)
    chain.left = leftovers(folder, temporary)
    chain.seconds = time.time() - start
    return chain


def moment(reference: Reference, rng: random.Random, fresh: bool) -> Kill:
    """When to kill next: anywhere, in a save, or (`fresh`: before any checkpoint) while tokens are cached."""
    first = rng.randrange(reference.arm.ranks) if reference.arm.ranks > 1 and rng.random() < 0.4 else None
    kind = rng.random()
    if fresh and reference.arm.cached and kind < 0.7:
        return Kill(rng.uniform(0, 1.1 * reference.lasts["cache"]), "cache", 1, first)
    if kind < 0.5:
        which = rng.randint(1, min(4, reference.times["save"]))
        return Kill(rng.uniform(0, 1.1 * reference.lasts["save"]), "save", which, first)
    # A fresh run should not end before its kill, also where the machine was busier when its time was measured.
    return Kill(rng.uniform(0, (0.7 if fresh else 1.0) * reference.seconds), first=first)
