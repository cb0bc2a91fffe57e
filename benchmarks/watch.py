"""A training loop seen from outside, through hooks on the student's decoder and on the optimizer."""

import time
from pathlib import Path
from typing import Any

import torch
from job import Job
from memory import process_mib
from torch import Tensor

PLACES = 65_536  # of a parameter, whose gradient is compared


def gradient_at_places(parameter: Tensor) -> Tensor:
    """The gradient of a parameter in fp64, of a large one at random places, the same ones each time."""
    assert parameter.grad is not None
    found, size = parameter.grad.detach().flatten(), parameter.numel()
    if size > PLACES:
        generator = torch.Generator().manual_seed(size)
        found = found[torch.randint(size, (PLACES,), generator=generator).to(found.device)]
    return found.double().cpu()


class Watch:
    """What a loop does: the tokens it runs the student on, its first gradient, when each step ends, memory."""

    def __init__(self, job: Job, student: Any) -> None:
        self.job, self._parameters = job, list(student.parameters())
        self.given: list[Tensor] = []  # tokens of each micro-batch, by a loop whose model is not told
        self._runs: list[tuple[Tensor | int, int]] = []  # by the model's inputs, tokens and positions of each
        self._ends: list[tuple[float, float, Any]] = []
        self.before_mib = self.start_s = float("nan")
        self.autocast = False
        student.get_decoder().register_forward_pre_hook(self._begin, with_kwargs=True)

    @property
    def cuda(self) -> bool:
        return self.job.device == "cuda"

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer of every loop. The learning rate is too small to move the losses of a few steps."""
        made = torch.optim.AdamW(list(parameters), lr=1e-6, fused=self.cuda)
        made.register_step_post_hook(lambda *_: self._end())
        return made

    def _begin(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # a check of the model, no training
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        if not self._runs:
            self.before_mib = torch.cuda.memory_allocated() / 2**20 if self.cuda else process_mib("VmRSS")
            self.start_s = time.process_time()
            self.autocast = torch.is_autocast_enabled(self.job.device)
        self._runs.append((ids.numel() if mask is None else mask.sum(), ids.numel()))

    def _end(self) -> None:
        if not self._ends:
            self.write_gradient()
        event = torch.cuda.Event(enable_timing=True) if self.cuda else None
        if event is not None:
            event.record()
        self._ends.append((time.process_time(), time.perf_counter(), event))

    def write_gradient(self) -> None:
        with Path(self.job.gradient).open("wb") as file:
            for parameter in self._parameters:
                gradient_at_places(parameter).numpy().tofile(file)

    def found(self) -> dict[str, Any]:
        """Milliseconds of single steps after the warm-up (device time, or processor time on a CPU, and wall time);
        tokens and positions of each step; MiB; seconds of processor time until the first forward pass."""
        if self.cuda:
            torch.cuda.synchronize()
        ends = self._ends[self.job.warmup - 1 :]
        pairs = list(zip(ends, ends[1:], strict=False))
        wall = [1e3 * (b[1] - a[1]) for a, b in pairs]
        ms = [a[2].elapsed_time(b[2]) if self.cuda else 1e3 * (b[0] - a[0]) for a, b in pairs]
        tokens = self.given or [tokens for tokens, _ in self._runs]
        runs = [(int(tokens), positions) for tokens, (_, positions) in zip(tokens, self._runs, strict=True)]
        size = self.job.accumulate
        steps = [runs[i : i + size] for i in range(0, len(runs), size)]
        return {
            "ms": ms,
            "wall_ms": wall,
            "tokens": [sum(tokens for tokens, _ in step) for step in steps],
            "positions": [sum(positions for _, positions in step) for step in steps],
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if self.cuda else process_mib("VmHWM"),
            "before_mib": self.before_mib,
            "start_s": self.start_s,
            "autocast": self.autocast,
        }
