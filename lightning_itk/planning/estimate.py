"""What a configuration needs, whether it fits, and which changes make it fit: every answer is simulated."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from lightning_itk.methods.module import InstructionModule
from lightning_itk.planning.devices import SHARE_OF_PEAK, SPARE, Device
from lightning_itk.planning.setting import Setting
from lightning_itk.planning.simulation import Step, simulate

GiB = 2**30
Build = Callable[[Setting, dict[str, Any]], Callable[[], InstructionModule]]
"""(setting, changed arguments of the module) -> what makes the module."""


@dataclass(frozen=True)
class Plan:
    """A run as it can be changed: what decides its memory, and arguments of its module that differ from the file's."""

    setting: Setting
    changed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suggestion:
    text: str
    peak: float  # bytes per rank


def peak(step: Step) -> tuple[str, dict[str, float]]:
    """The moment of a step with the most live bytes, and those by part."""
    return max(step.peaks.items(), key=lambda item: sum(item[1].values()))


def fits(step: Step, device: Device) -> bool:
    """Whether a rank's peak leaves what a device needs beside tensors."""
    return sum(peak(step)[1].values()) <= SPARE * device.memory * GiB


def seconds(step: Step, device: Device, precision: str) -> tuple[float, str]:
    """Time of a step on a rank, and what bounds it: products at a share of the device's rate, or its memory."""
    rate = device.tflops_fp32 if precision.startswith("32") else device.tflops
    compute, memory = step.flops / (rate * 1e12 * SHARE_OF_PEAK), step.traffic / (device.bandwidth * 1e9)
    return (compute, "products") if compute >= memory else (memory, "memory bandwidth")


def suggestions(plan: Plan, build: Build, device: Device, every: int, can_cache: bool) -> list[Suggestion]:
    """Changes after which the run fits, each tried in the simulation; the gradient of a step stays the same.

    Args:
        can_cache: teachers may run before.
    """
    found = []
    for kind in _changes(plan, can_cache):
        for text, changed in kind:  # the first that fits stands for its kind
            step = simulate(build(changed.setting, changed.changed), changed.setting, every)
            if fits(step, device):
                found.append(Suggestion(text, sum(peak(step)[1].values())))
                break
    return found


def _changes(plan: Plan, can_cache: bool) -> Iterator[Iterator[tuple[str, Plan]]]:
    """Kinds of changes; of each the smallest first."""
    setting = plan.setting
    named = "gradient checkpointing (model.init_args.gradient_checkpointing: true)"
    checkpointed = replace(plan, changed=plan.changed | {"gradient_checkpointing": True})
    if checkpointed != plan:
        yield iter([(named, checkpointed)])

    def also(text: str, changed: Setting) -> Iterator[tuple[str, Plan]]:
        yield text, replace(plan, setting=changed)
        if checkpointed != plan:
            yield f"{text} and {named}", replace(checkpointed, setting=changed)

    if setting.rows > 1:
        less = replace(setting, rows=1, accumulate=setting.accumulate * setting.rows)
        yield also(f"data.batch_size: 1, trainer.accumulate_grad_batches: {less.accumulate} (the same gradient)", less)
    if can_cache:
        yield also("a cached teacher (lightning-itk cache-teacher)", replace(setting, cached_teacher=True))
    ddp = setting.strategy == "ddp"
    larger = [n for n in (2, 4, 8, 16, 32, 64) if n > setting.ranks or (n == setting.ranks and ddp)]
    sharded = {n: replace(setting, strategy="fsdp2", ranks=n) for n in larger}
    text = "weights, gradients and optimizer sharded over {} devices (ModelParallelStrategy)"
    yield chain.from_iterable(also(text.format(n), changed) for n, changed in sharded.items())


def host_bytes(step: Step, setting: Setting) -> float:
    """RAM of a rank while it loads: its rows of every model under FSDP2, else every model whole."""
    return sum(step.weights) / (setting.ranks if setting.strategy == "fsdp2" else 1)
