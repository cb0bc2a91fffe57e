"""One start of a run, on all its ranks, and the kill that may end it."""

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from chaos.arms import Arm
from chaos.run import fit
from processes import CONTEXT, PRELOAD, enter, environments

# A child is forked from a process that has imported all this: a run starts in a second.
CONTEXT.set_forkserver_preload(
    [*PRELOAD, "chaos.run", "lightning_itk.cli.fit", "transformers.models.llama.modeling_llama", "tensorboard"]
)

_GRACE = 5.0  # seconds for the ranks that are left when one is gone


@dataclass(frozen=True)
class Kill:
    """When to kill: so many seconds after the start, or after a phase has begun for the nth time.

    Args:
        delay: seconds.
        phase: of rank 0, as in its journal; "" = the start.
        count: which time, from 1.
        first: the rank that is killed first, alone; None = all at once.
    """

    delay: float
    phase: str = ""
    count: int = 1
    first: int | None = None


@dataclass
class Outcome:
    """How an attempt ended.

    Args:
        killed: the phase it was killed in, None where it was not.
        error: why it ended with another exit code than 0 without being killed; "" otherwise.
        survivors: what became of the ranks that were left when one was killed: ended, or killed too.
        seconds: from its start to its end.
    """

    killed: str | None = None
    error: str = ""
    survivors: str = ""
    seconds: float = 0.0


class Attempt:
    """`lightning-itk fit` in a folder; from the last checkpoint where there is one."""

    def __init__(self, arm: Arm, config: Path, folder: Path, number: int, temporary: Path) -> None:
        self.folder, self.number = folder, number
        self.resumes = any(folder.glob("runs/**/*.ckpt"))
        arguments = ["--config", str(config), *(["--ckpt_path", "last"] if self.resumes else [])]
        temporary.mkdir(parents=True, exist_ok=True)
        self.ranks = [
            CONTEXT.Process(target=enter, args=(fit, (folder, number, arguments), env | {"TMPDIR": str(temporary)}))
            for env in environments(arm.ranks)
        ]
        self._phases: list[tuple[str, float]] = []
        self._read = 0

    def run(self, kill: Kill | None = None, limit: float = 180) -> Outcome:
        """Start it, and kill it when it is time. limit: seconds after which it counts as hung."""
        start = time.time()
        for rank in self.ranks:
            rank.start()
        outcome = Outcome()
        try:
            while waited := [rank.sentinel for rank in self.ranks if rank.exitcode is None]:
                if kill is not None and self._is_time(kill, start):
                    outcome.survivors = self._kill(kill.first)
                    outcome.killed = ([phase for phase, _ in self.phases()] or ["start"])[-1]
                    break
                if time.time() - start > limit:
                    outcome.error = f"hung: not at its end after {limit} s, in phase {self.phases()[-1:]}"
                    break
                if any(rank.exitcode for rank in self.ranks):  # the others cannot go on without it
                    wait(waited, _GRACE)
                    break
                wait(waited, 0.003)
        finally:
            self._kill()
        outcome.seconds = time.time() - start
        codes = [rank.exitcode for rank in self.ranks]
        if outcome.killed is None and any(codes) and not outcome.error:
            outcome.error = f"exit codes {codes}: {self._last_words()}"
        return outcome

    def phases(self) -> list[tuple[str, float]]:
        """What rank 0 has said so far: the phases and when they began."""
        path = self.folder / f"journal-{self.number:02}-0.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                lines = file.read()
            self._read += len(lines)
            entries = map(json.loads, lines.splitlines())
            self._phases += [(entry["phase"], entry["time"]) for entry in entries if "phase" in entry]
        return self._phases

    def _is_time(self, kill: Kill, start: float) -> bool:
        if kill.phase:
            begun = [time for phase, time in self.phases() if phase == kill.phase]
            if len(begun) < kill.count:
                return False
            start = begun[kill.count - 1]
        return time.time() >= start + kill.delay

    def _kill(self, first: int | None = None) -> str:
        """SIGKILL to every rank with all its children; to one of them before the others."""
        survivors = ""
        if first is not None:
            self._kill_rank(first)
            others = [rank for number, rank in enumerate(self.ranks) if number != first]
            for rank in others:
                rank.join(_GRACE)
            survivors = "killed too" if any(rank.exitcode is None for rank in others) else "ended"
        for number in range(len(self.ranks)):
            self._kill_rank(number)
        for rank in self.ranks:
            rank.join()
        return survivors

    def _kill_rank(self, number: int) -> None:
        process = self.ranks[number]
        if process.pid is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may not lead a group yet, or be gone
            os.killpg(process.pid, signal.SIGKILL)
        if process.exitcode is None:
            process.kill()

    def _last_words(self) -> str:
        logs = [self.folder / f"log-{self.number:02}-{rank}.txt" for rank in range(len(self.ranks))]
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if "error:" in line]
        return (errors or lines or ["it said nothing"])[-1][:300]
