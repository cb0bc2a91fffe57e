"""What a run logs: the means of an optimizer step, and those of a validation or test over all its batches."""

import re
import time
import warnings
from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from lightning_itk.methods.step import Term
from lightning_itk.metrics import ResponsePerplexity, TokenMean
from lightning_itk.models.precision import sum_dtype


class Figures:
    """Logs through a module: sums over tokens, batches and ranks, divided once."""

    def __init__(self) -> None:
        self._metrics: dict[str, TokenMean] = {}
        self._clock: tuple[float, int] | None = None

    def begin(self) -> None:
        """Training starts: what lies before is no part of the tokens per second."""
        self._clock = None

    def log_step(self, module: L.LightningModule, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor]) -> None:
        """Log an optimizer step.

        Args:
            module: what logs.
            optimizer: whose learning rate is logged.
            sums: of `StepSums`, over the ranks.
        """
        names = [name.removeprefix("train/") for name in sums if name.startswith("train/")]
        means = {name: (sums[f"train/{name}"] / sums[f"elements/{name}"].clamp_min(1)).float() for name in names}
        module.log_dict({f"train/{name}": mean for name, mean in means.items()})
        module.log("loss", means["loss"], prog_bar=True, logger=False)
        module.log("train/lr", optimizer.param_groups[0]["lr"])
        module.log("train/padding", (1 - sums["tokens"] / sums["slots"]).float())
        now, step = time.perf_counter(), module.trainer.global_step
        if self._clock is not None and step > self._clock[1]:
            seconds_per_step = (now - self._clock[0]) / (step - self._clock[1])
            module.log("tokens/s", (sums["tokens"] / seconds_per_step).float(), prog_bar=True)
        self._clock = (now, step)

    def add(self, stage: str, terms: Mapping[str, Term], targets: Tensor) -> None:
        """Add a batch of a validation or test; targets: the elements of terms that name none."""
        for name, (total, _, elements) in terms.items():
            elements = targets if elements is None else elements
            self._metric(f"{stage}/{name}", TokenMean, targets.device).update(total, elements)
            if name == "response_loss":
                self._metric(f"{stage}/perplexity", ResponsePerplexity, targets.device).update(total, elements)

    def log_evaluation(self, module: L.LightningModule) -> None:
        """Log what was added, and begin anew."""
        for name, metric in self._metrics.items():
            # Metrics have been summed over the ranks; Lightning, which cannot know, recommends to do it.
            advice = re.escape(f"It is recommended to use `self.log({name!r}, ..., sync_dist=True)`")
            warnings.filterwarnings("ignore", message=advice)
            module.log(name, metric.compute(), prog_bar=name == "val/loss")
        self._metrics.clear()

    def _metric(self, name: str, kind: type[TokenMean], device: torch.device) -> TokenMean:
        if name not in self._metrics:
            self._metrics[name] = kind(sum_dtype(device)).to(device)
        return self._metrics[name]
