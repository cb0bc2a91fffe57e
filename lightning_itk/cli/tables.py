"""What the commands print: a selection and a ranking of teachers, as tables."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from lightning_itk.choice.car import TeacherRank
from lightning_itk.selection.scores import Scores


def selection_table(
    recorded: Scores, summary: dict[str, float], records: int, rule: str, labels: np.ndarray | None = None
) -> Table:
    """What a selection holds.

    Args:
        recorded: the scores.
        summary: of `selection.describe`.
        records: how many the data have.
        rule: how they were chosen, in words.
        labels: the cluster of each scored record.
    """
    meta = recorded.meta
    rows = {
        "scored by": f"{meta.get('model', 'an unnamed model')}, epochs {meta['epochs']}",
        "records": f"{records:,}, scored {summary['samples']:,.0f}",
        "dropped before scoring": f"{records - summary['samples']:,.0f}",
        "score undefined": f"{summary['dropped']:,.0f}, {summary['without_response']:,.0f} without response",
        "chosen": f"{summary['selected']:,.0f}, {rule}",
        "score of the chosen": f"{summary['lowest']:.4g} to {summary['highest']:.4g}",
        "mean response tokens": f"{summary['mean_tokens']:.1f} chosen, {summary['mean_tokens_all']:.1f} all",
        "same as a random choice": f"{summary['overlap_random']:.1%}",
        "same as the longest responses": f"{summary['overlap_longest']:.1%}",
    }
    if labels is not None:
        rows["clusters"] = f"{len(np.unique(labels[~np.isnan(recorded.losses[0])])):,}"
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def ranking_table(ranking: Sequence[TeacherRank]) -> Table:
    """Teachers by falling CAR, its parts and its rivals beside it."""
    table = Table(title=f"{ranking[0].prompts:,} instructions", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("teacher", overflow="fold")
    for name in ("CAR", "95 % interval", "best", "reward", "loss", "RSR", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in ranking:
        low, high = row.interval
        rsr = "" if row.rsr is None else f"{row.rsr:.2f}"
        cells = (f"{row.car:.4g}", f"{low:.3g} to {high:.3g}", f"{row.best:.0%}", f"{row.reward:.4g}")
        table.add_row(row.teacher, *cells, f"{row.loss:.3f}", rsr, f"{row.length:.1f}")
    return table


def verdicts(ranking: Sequence[TeacherRank]) -> list[str]:
    """Who is best, and who cannot be told apart, as sentences. Every pair is named once."""
    names = [row.teacher for row in ranking]
    said = []
    for place, row in enumerate(ranking):
        below = [name for name in row.tied_with if names.index(name) > place]
        if below:
            said.append(f"{row.teacher} cannot be told apart from {', '.join(below)}")
        elif place == 0:
            said.append(f"{row.teacher} is the best teacher for this student by CAR")
    return said


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields what tells it how many are done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
