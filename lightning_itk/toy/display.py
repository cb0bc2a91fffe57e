"""What a person sees while the quickstart trains: one bar per stage, and none of the libraries' chatter."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging


class StageBar(Callback):
    """One line with the steps and the loss while a stage trains."""

    def __init__(self, title: str, steps: int, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
        loss = TextColumn("loss {task.fields[loss]:.3f}")
        self.progress = Progress(*columns, loss, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(title, total=steps, loss=float("nan"))

    def on_train_start(self, *_: Any) -> None:
        self.progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        loss = trainer.callback_metrics.get("loss", torch.nan)
        self.progress.update(self.task, completed=trainer.global_step, loss=float(loss))

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()

    def on_exception(self, *_: Any) -> None:
        self.progress.stop()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave only what a newcomer should read: no tips, no bars of loading, no advice about data loaders.

    Global states (logging, random numbers, threads) are put back afterwards.
    """
    lightning, own = logging.getLogger("lightning.pytorch"), logging.getLogger("lightning_itk")
    levels = lightning.level, own.level
    bars = transformers_logging.is_progress_bar_enabled()
    threads = torch.get_num_threads()
    shared = get_console()  # where the recorder draws its bar
    shown = shared.quiet
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        lightning.setLevel(logging.ERROR)
        own.setLevel(logging.WARNING)
        transformers_logging.disable_progress_bar()
        shared.quiet = True
        torch.set_num_threads(min(2, threads))  # more threads than that only wait for each other on models so small
        yield
    finally:
        lightning.setLevel(levels[0])
        own.setLevel(levels[1])
        shared.quiet = shown
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
