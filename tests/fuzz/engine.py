"""Runs cases of one kind until their time is over: Hypothesis makes them from a number and shrinks what fails.

Cases come in batches. A batch is its kind and its number, a failure is also a text that holds the shrunk case itself:
`make fuzz CASE=kind:number` and `CASE=kind:text` run either again.
"""

import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

CPU_SECONDS = 30
"""What a case may take; more counts as a hang."""
_ROOT = str(Path(__file__).parents[2])
_TEXT = re.compile(r"@reproduce_failure\('[^']*', b'([^']*)'\)")


@dataclass(frozen=True)
class Kind:
    """One subject: a property of Hypothesis' data that returns what became of the case, in a word, or raises."""

    name: str
    case: Callable[[Any], str]
    batch: int = 50
    least: int = 100  # cases that 12 seconds must give, on a slow machine too


@dataclass
class Failure:
    """What went wrong, told apart by the error's type and place."""

    where: str
    number: int  # of the batch that showed it first
    text: str  # the shrunk case, for CASE=kind:text; "" where it was not shrunk
    report: str
    count: int = 1


@dataclass
class Figures:
    """What a kind's cases came to."""

    kind: str
    first: int  # number of the first batch
    batches: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.outcomes.total()

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "batches": [self.first, self.first + self.batches],
            "seconds": round(self.seconds, 1),
            "cases": self.cases,
            "per_second": round(self.cases / max(self.seconds, 1e-9), 1),
            "outcomes": dict(sorted(self.outcomes.items())),
            "failures": [asdict(failure) for failure in self.found()],
        }

    def found(self) -> list[Failure]:
        return list(self.failures.values())

    def __str__(self) -> str:
        became = ", ".join(f"{count:,} {name}" for name, count in sorted(self.outcomes.items()))
        rate = self.cases / max(self.seconds, 1e-9)
        text = f"{self.kind:<10}{self.cases:>9,} cases {rate:>8.1f} a second   {len(self.failures)} failures   {became}"
        return text + "".join(f"\n{self.told(where)}" for where in self.failures)

    def told(self, where: str) -> str:
        """A failure, and how to run it again."""
        failure = self.failures[where]
        again = f"make fuzz CASE={self.kind}:{failure.text or failure.number} (first seen in batch {failure.number})"
        return f"--- {self.kind}, {failure.count}x: {failure.report}\nagain: {again}"


def run(kind: Kind, figures: Figures, seconds: float, *, shrink: bool = True, stop: bool = False) -> Figures:
    """Batches one after the other, from where the figures stand.

    Args:
        kind: what to run.
        figures: are added to.
        seconds: no batch begins after so many.
        shrink: look for the smallest case of each new failure, which takes a while.
        stop: at the first failure.
    """
    start = time.monotonic()
    while time.monotonic() - start < seconds and not (stop and figures.failures):
        batch(kind, figures.first + figures.batches, figures, shrink=shrink)
        figures.batches += 1
    figures.seconds += time.monotonic() - start
    return figures


def batch(kind: Kind, number: int, figures: Figures, *, shrink: bool = True, text: str = "") -> None:
    """One batch, or the one case that a failure's text holds."""
    failed: set[str] = set()

    def one(data: st.DataObject) -> None:
        try:
            with _limited():
                outcome = kind.case(data)
        except Exception as error:
            if not type(error).__module__.startswith("hypothesis"):  # that is how it ends a case it has no use for
                failed.add(_where(error))
            raise
        if not failed:  # what shrinking tries is not counted
            figures.outcomes[outcome] += 1

    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    options = hypothesis.settings(
        max_examples=kind.batch,
        phases=phases,
        database=None,
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    test = options(hypothesis.given(st.data())(one))
    if text:
        test = hypothesis.reproduce_failure(hypothesis.__version__, text.encode())(test)
    try:
        hypothesis.seed(number)(test)()
    except Exception as error:
        where = _where(error)
        if where in figures.failures:
            figures.failures[where].count += 1
            return
        found = _TEXT.search("\n".join(getattr(error, "__notes__", [])))
        report = "".join(traceback.format_exception(error)).strip()
        figures.failures[where] = Failure(where, number, found[1] if found else "", report)


def one_line(error: Exception, *parts: str, longest: int = 1000) -> None:
    """What a user's mistake must become: one line, not an endless one, that holds `parts`."""
    line = str(error)
    for part in parts:
        assert part in line, f"nothing of {part} in {line[:400]!r}"
    assert line.strip(), f"{type(error).__name__} says nothing"
    assert len(line.splitlines()) == 1, f"several lines: {line[:400]!r}"
    assert len(line) <= longest, f"{len(line)} characters: {line[:400]!r}"


def _where(error: BaseException) -> str:
    """An error's type and the innermost line of this repository that it went through."""
    if isinstance(error, BaseExceptionGroup):
        return _where(error.exceptions[0])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_ROOT)]
    place = f"{Path(frames[-1].filename).relative_to(_ROOT)}:{frames[-1].lineno}" if frames else "?"
    said = re.split(r"[:\d'\"/\n]", str(error))[0][:120] if isinstance(error, AssertionError) else ""
    return f"{type(error).__name__} at {place} {said}".strip()


class _limited:
    """Raises where a case takes too much of the processor; a case that sleeps is pytest's to end."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGVTALRM, self._end)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, self._before)

    @staticmethod
    def _end(*_: object) -> None:
        raise AssertionError(f"a case took more than {CPU_SECONDS} seconds of processor time")
