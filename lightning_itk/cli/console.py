"""What the commands share: where they run, the one file they are given, a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from lightning_itk.data.sources import Source, as_sources


def one_source(given: Any, what: str) -> Source:
    """The only source that is given; `what` names it where there are more or none."""
    sources = as_sources(given)
    if len(sources) != 1:
        raise ValueError(f"{what} names {len(sources)} files, expected one")
    return sources[0]


def device_of(name: str) -> torch.device:
    """A device that works by its name; auto = a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields what tells it how many are done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
